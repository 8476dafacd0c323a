"""custom: the user's own module by its name."""

import importlib
import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, Field
from torch import nn

from nn_models.errors import UserError, did_you_mean
from nn_models.model import Batching, ModelSpec, reading
from nn_models.signature import Signature
from nn_models.spec import invalid, short


def _module_and_name(target: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", target):
        raise invalid(f"must name a module and a class in it, like my_package.nets:MyNet, not {short(target)}")
    return target


class CustomSpec(ModelSpec):
    """Your own torch.nn.Module, named by its module and class.

    A recipe may come from somebody else, with a run's files. So the module that it names is imported, but nothing in
    there is called unless it is made to give a torch.nn.Module: `subprocess:run` is not.
    """

    reads = reading()  # whatever there is: only it knows
    kind: Literal["custom"] = "custom"
    target: Annotated[str, AfterValidator(_module_and_name)] = Field(
        description="such as my_package.nets:MyNet: a torch.nn.Module class, or a function annotated to return one"
    )
    arguments: dict[str, Any] = Field(
        {},
        description="what it is called with; a parameter named signature also gets the data's Signature",
    )

    @property
    def batches(self) -> Batching:
        """See ModelSpec."""
        return "vmap"

    def check(self, signature: Signature) -> None:
        """Raise UserError where there is no such target or it does not take the arguments; any input will do."""
        target = self._find_target()
        try:
            inspect.signature(target).bind(**self._all_arguments(target, signature))
        except TypeError as error:
            raise self._refusal(error) from error

    def build(self, signature: Signature) -> nn.Module:
        """What the target makes of the arguments."""
        target = self._find_target()
        try:
            model = target(**self._all_arguments(target, signature))
        except TypeError as error:
            raise self._refusal(error) from error
        if not isinstance(model, nn.Module):
            raise UserError("model.target", f"{self.target} returned {model!r}", "it must return a torch.nn.Module")
        return model

    def _find_target(self) -> Callable[..., Any]:
        path, name = self.target.split(":")
        try:
            module = importlib.import_module(path)
        except ImportError as error:
            raise UserError(
                "model.target", f"cannot import {path}: {error}", "install it, or put its folder on PYTHONPATH"
            ) from error
        except (Exception, SystemExit) as error:  # the module may do anything
            raise UserError(
                "model.target", f"importing {path} failed ({type(error).__name__}: {error})", "mend that module"
            ) from error
        if not hasattr(module, name):
            callables = [known for known, value in vars(module).items() if _makes_modules(value)]
            raise UserError("model.target", f"{path} has no {name}", did_you_mean(name, callables))
        target = getattr(module, name)
        if inspect.isfunction(target) and not _makes_modules(target):
            raise UserError(
                "model.target",
                f"{self.target} is a function not annotated to return a torch.nn.Module, so it is not called",
                f"write `def {name}(…) -> nn.Module:`",
            )
        if not _makes_modules(target):
            raise UserError(
                "model.target",
                f"{self.target} is {target!r}",
                "name a class derived from torch.nn.Module, or a function annotated to return one",
            )
        return target

    def _all_arguments(self, target: Callable[..., Any], signature: Signature) -> dict[str, Any]:
        wants_signature = "signature" in inspect.signature(target).parameters
        return ({"signature": signature} if wants_signature else {}) | self.arguments

    def _refusal(self, error: TypeError) -> UserError:
        return UserError("model.arguments", f"{self.target} does not take {self.arguments}: {error}")


def _makes_modules(target: Any) -> bool:
    """Whether it is a class of modules, or a function that says that it returns one."""
    made = _returned(target) if inspect.isfunction(target) else target
    return inspect.isclass(made) and issubclass(made, nn.Module)


def _returned(function: Callable[..., Any]) -> Any:
    """The annotation of what a function returns, resolved where it is text; None where there is none."""
    defined = inspect.unwrap(function)
    try:
        # alone: the other annotations may name what is imported for type checkers only
        alone = SimpleNamespace(__annotations__={"return": defined.__annotations__.get("return")})
        return get_type_hints(alone, globalns=defined.__globals__)["return"]
    except Exception:  # text may be anything
        return None
