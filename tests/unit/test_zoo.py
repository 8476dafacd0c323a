"""The zoo is the test matrix: a model is tested by being listed."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import nn_models
from nn_models import tables, zoo
from nn_models.adversarial import AdversarialSpec, Halves
from nn_models.batch import Forest, Ragged
from nn_models.columns import Features, Image, Label, Labels, Numbers, Scene, Sequence, Tokens, Tree
from nn_models.errors import UserError
from nn_models.model import ModelSpec
from nn_models.parser import Parsed
from nn_models.signature import Signature
from nn_models.variational import VAE

NUM_ROWS = 3


class TinyNet(nn.Module):
    def __init__(self, signature: Signature, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(signature.input_size, width),
            nn.ReLU(),
            nn.Linear(width, signature.num_outputs),
        )

    def forward(self, x):
        return self.layers(x)


class BrokenNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        raise TypeError("broken inside")


def make_plain(num_inputs, num_outputs) -> nn.Linear:
    return nn.Linear(num_inputs, num_outputs)


def make_later(signature: "OnlyForTypeCheckers") -> "nn.Module":  # noqa: F821
    return nn.Linear(signature.input_size, signature.num_outputs)


def make_nothing() -> nn.Module:
    return None


CALLED = []


def not_annotated(*arguments, **named):
    CALLED.append("not_annotated")


def of_no_module() -> int:
    CALLED.append("of_no_module")
    return 0


def of_nobody_knows_what() -> "NoSuchClass":  # noqa: F821
    CALLED.append("of_nobody_knows_what")
    return nn.Identity()


not_a_net = 3
TINY = f"{__name__}:TinyNet"

features = Signature(input_shape=(12,), num_outputs=3)
digits = Signature(input_shape=(1, 8, 8), num_outputs=10)
fashion = Signature(input_shape=(1, 28, 28), num_outputs=10)
colour = Signature(input_shape=(3, 63, 70), num_outputs=5)
wide = Signature(input_shape=(3, 16, 24), num_outputs=2)
pairs = Signature(input_shape=(3, 28, 28), condition_shape=(1, 28, 28), num_outputs=1)
odd_pairs = Signature(input_shape=(1, 11, 70), condition_shape=(2, 11, 70), num_outputs=1)

# What each kind can read, with some of its fields set; a kind without a line here fails the first test.
sequences = Signature(columns={"input": Sequence(width=4, length=5), "target": Numbers(size=2)})
texts = Signature(columns={"input": Tokens(size=9), "target": Label(size=3)})
tagged = Signature(columns={"input": Sequence(width=3), "target": Labels(size=2)})
stream = Signature(columns={"input": Tokens(size=9, length=6), "target": Labels(size=9, length=6)})
trees = Signature(columns={"input": Tree(size=9), "target": Label(size=3)})
labelled_trees = Signature(columns={"input": Tree(size=9, known=1), "target": Labels(size=3)})
dependencies = Signature(columns={"input": Tree(size=9, arity=3, words_at="nodes"), "target": Numbers(size=2)})
scenes = Signature(columns={"input": Scene(width=4, degree=2, names=("a", "b"))})
FITTING = {
    "mlp": [
        ({}, features),
        ({}, fashion),
        ({"hidden": []}, digits),
        ({"hidden": [9, 5], "activation": "tanh", "batch_norm": True, "dropout": 0.5}, features),
    ],
    "cnn": [
        ({}, digits),
        ({}, fashion),
        (
            {
                "channels": [4, 6, 8],
                "convolutions_per_block": 2,
                "kernel_size": 5,
                "pooling": "average",
                "activation": "gelu",
                "batch_norm": True,
                "hidden": [],
                "dropout": 0.5,
            },
            colour,
        ),
    ],
    "alexnet": [
        ({}, colour),
        ({"variant": "small"}, fashion),
        ({"variant": "small", "dropout": 0}, colour),
    ],
    "gan": [
        ({}, features),
        ({}, digits),
        (
            {
                "noise_size": 3,
                "spectral_norm": True,
                "generator_hidden": [],
                "discriminator_hidden": [9, 5],
                "activation": "maxout",
                "pieces": 2,
                "dropout": 0,
            },
            wide,
        ),
    ],
    "dcgan": [
        ({"width": 4}, digits),
        ({"width": 4, "noise_size": 5, "discriminator_norm": "layer"}, fashion),
        ({"width": 4, "spectral_norm": True, "discriminator_norm": "none"}, wide),
    ],
    "conditional_gan": [
        ({"width": 4}, digits),
        ({"width": 4, "embedding_size": 3, "discriminator_norm": "layer"}, fashion),
        ({"width": 4, "spectral_norm": True, "discriminator_norm": "none"}, wide),
    ],
    "pix2pix": [
        ({"width": 4}, pairs),
        ({"width": 4, "norm": "batch", "spectral_norm": True, "dropout": 0}, odd_pairs),
        ({"width": 4, "levels": 1, "patch_levels": 2}, pairs),
    ],
    "rnn": [
        ({"hidden": 5}, digits),
        ({"hidden": 5, "activation": "linear", "images": "pixels", "permutation": 3, "pool": "mean"}, fashion),
        ({"hidden": 4, "layer_norm": True, "initial_state": "learned", "pool": "max"}, texts),
        ({"hidden": 4, "activation": "sigmoid", "layers": 2, "bidirectional": True, "dropout": 0.5}, tagged),
    ],
    "lstm": [
        ({"hidden": 5}, colour),
        ({"hidden": 5, "layers": 2, "bidirectional": True, "initial_state": "learned", "dropout": 0.5}, sequences),
        ({"hidden": 4, "layer_norm": True}, tagged),
        ({"hidden": 4, "embedding": 4, "tied": True}, stream),
    ],
    "peephole_lstm": [
        ({"hidden": 5, "recurrent_init": "identity"}, digits),
        ({"hidden": 5, "layers": 2, "bidirectional": True, "pool": "mean"}, sequences),
        ({"hidden": 4, "layer_norm": True, "initial_state": "learned"}, stream),
    ],
    "gru": [
        ({"hidden": 5, "recurrent_init": "uniform"}, digits),
        ({"hidden": 5, "reset": "before", "bidirectional": True}, texts),
        ({"hidden": 4, "layers": 2, "initial_state": "learned", "pool": "max"}, tagged),
        ({"hidden": 4, "layer_norm": True}, sequences),
    ],
    "autoencoder": [
        ({"hidden": [9], "code": 3}, features),
        ({"hidden": [], "code": 5, "code_activation": "sigmoid"}, digits),
        ({"hidden": [9, 7], "code": 3, "activation": "tanh", "tied": True}, wide),
        ({"hidden": [9], "code": 4, "activation": "linear", "code_activation": "softplus"}, fashion),
    ],
    "conv_autoencoder": [
        ({"channels": [4], "code": 5}, digits),
        ({"channels": [4, 6], "hidden": [9], "code": 5, "activation": "tanh"}, fashion),
        ({"channels": [4, 6, 8], "code": 5, "activation": "elu", "code_activation": "tanh"}, colour),
    ],
    "sequence_autoencoder": [
        ({"hidden": 5, "code": 3}, digits),
        ({"hidden": 5, "code": 3, "cell": "lstm", "layers": 2, "code_activation": "tanh"}, colour),
        ({"hidden": 5, "code": 3, "cell": "rnn"}, sequences),
    ],
    "vae": [
        ({"hidden": [9], "code": 3, "decoder": "gaussian"}, features),
        ({"hidden": [], "code": 3, "activation": "tanh"}, digits),
        ({"channels": [4, 6], "hidden": [9, 7], "code": 3, "decoder": "gaussian", "variance": 0.1}, colour),
    ],
    "conditional_vae": [
        ({"hidden": [9], "code": 3}, digits),
        ({"channels": [4], "hidden": [9], "code": 3, "decoder": "gaussian"}, wide),
    ],
    "recursive": [
        ({"hidden": 4}, trees),
        ({"hidden": 4, "dropout": 0.5}, labelled_trees),
    ],
    "rntn": [
        ({"hidden": 4}, labelled_trees),
        ({"hidden": 4, "dropout": 0.5}, trees),
    ],
    "tree_lstm": [
        ({"hidden": 4, "embedding": 5}, trees),
        ({"hidden": 4, "dropout": 0.5, "forget_bias": 0}, labelled_trees),
    ],
    "child_sum_tree_lstm": [
        ({"hidden": 4, "embedding": 5}, trees),
        ({"hidden": 4, "dropout": 0.5, "forget_bias": 0}, labelled_trees),
        ({"hidden": 4}, dependencies),
    ],
    "parser": [
        ({"hidden": 4, "embedding": 5}, trees),
        ({"hidden": 4, "beam": 3, "train_beam": 2, "dropout": 0.5}, labelled_trees),
    ],
    "labelled_parser": [({"hidden": 4, "beam": 2}, labelled_trees)],
    "scene_parser": [({"hidden": 4}, scenes), ({"hidden": 4, "beam": 3, "train_beam": 2}, scenes)],
    "custom": [
        ({"target": TINY}, features),
        ({"target": TINY, "arguments": {"width": 2}}, colour),
        ({"target": f"{__name__}:make_plain", "arguments": {"num_inputs": 12, "num_outputs": 3}}, features),
        ({"target": f"{__name__}:make_later"}, features),
        ({"target": "torch.nn:Linear", "arguments": {"in_features": 12, "out_features": 3}}, features),
    ],
}
CASES = [
    pytest.param({"kind": kind, **fields}, signature, id=f"{kind}-{number}")
    for kind, cases in FITTING.items()
    for number, (fields, signature) in enumerate(cases)
]
matrix = pytest.mark.parametrize(("model", "signature"), CASES)


def filled(value, generator):
    """An imagined column with numbers drawn where it has numbers; words and trees stay as they are imagined."""
    if isinstance(value, Ragged):
        return replace(value, values=filled(value.values, generator))
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.device.type != "meta":
        return torch.randn(value.shape, generator=generator)
    return value


def rows_of(signature):
    imagined, generator = signature.imagine(NUM_ROWS), torch.Generator().manual_seed(0)
    return {name: filled(value, generator) for name, value in imagined.columns.items()}


def seeded(model, signature):
    torch.manual_seed(0)
    return zoo.build(model, signature)


def run(module, model, signature):
    """What the module says of some rows; where it is two halves, what one says of the other's rows."""
    torch.manual_seed(0)  # dropout
    rows = rows_of(signature)
    if isinstance(module, VAE):
        keys = torch.arange(NUM_ROWS, device=rows["input"].device)
        inferred = module(rows["input"].sigmoid(), keys, label=rows["target"])
        return inferred.outputs + inferred.log_likelihood.mean() + inferred.log_variance.mean()
    if not isinstance(module, Halves):
        outputs = module(rows["input"])
        if not isinstance(outputs, Parsed):
            return outputs
        labelled = 0 if outputs.labelled is None else outputs.labelled.scores.mean()
        return torch.stack((outputs.score, outputs.true_score + labelled), 1)
    spec = zoo.validate(zoo.AnyModelSpec, model)
    condition = rows[spec.given or "target"]  # not looked at where the model is given none
    made = module(torch.randn(NUM_ROWS, spec.noise_size, device=condition.device), condition)
    assert made.shape == (NUM_ROWS, *signature.input_shape)
    return module.discriminator(made, condition)


def check_shape(outputs, model, signature):
    """What the spec says that the model gives is what comes out."""
    gives, rows = zoo.validate(zoo.AnyModelSpec, model).gives, rows_of(signature)["input"]
    if "elements" in gives and isinstance(signature["target"], Labels):
        if isinstance(rows, Forest):
            elements = len(rows.words)
        else:
            elements = len(rows.values) if isinstance(rows, Ragged) else NUM_ROWS * rows.shape[1]
        assert outputs.shape == (elements, signature.num_outputs)
    elif "row" in gives:
        assert outputs.shape == (NUM_ROWS, signature.num_outputs)
    elif gives & {"reconstruction", "posterior"}:
        assert outputs.shape == rows.shape
    elif gives & {"tree", "labelled_tree", "joins"}:
        assert outputs.shape == (NUM_ROWS, 2)
    else:
        assert outputs.shape[0] == NUM_ROWS
        assert outputs.dim() == 1 or (outputs.dim() == 4 and outputs.shape[1] == 1)  # a logit a row, or a patch


def test_every_kind_is_in_the_matrix():
    assert set(FITTING) == set(zoo.MODELS)
    assert all(spec.model_fields["kind"].default == kind for kind, spec in zoo.MODELS.items())


@matrix
def test_forward_and_backward(model, signature):
    module = seeded(model, signature)
    outputs = run(module, model, signature)
    check_shape(outputs, model, signature)
    outputs.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name  # every parameter takes part


@matrix
def test_same_seed_same_weights_and_a_state_dict_carries_them(model, signature):
    first, second = seeded(model, signature).eval(), seeded(model, signature).eval()
    with torch.no_grad():
        for name, weight in second.state_dict().items():
            assert torch.equal(weight, first.state_dict()[name]), name
        for parameter in second.parameters():
            parameter.add_(1)
        assert not torch.equal(run(first, model, signature), run(second, model, signature))
        second.load_state_dict(first.state_dict(), strict=True)
        assert torch.equal(run(first, model, signature), run(second, model, signature))


@matrix
def test_builds_and_runs_on_the_meta_device(model, signature):
    with torch.device("meta"):
        module = zoo.build(model, signature)
        outputs = run(module, model, signature)
        check_shape(outputs, model, signature)
    assert {weight.device.type for weight in module.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("kind", [kind for kind, spec in zoo.MODELS.items() if issubclass(spec, AdversarialSpec)])
def test_an_adversarial_model_is_the_two_halves_that_its_spec_builds(kind):
    model, signature = {"kind": kind, **FITTING[kind][0][0]}, FITTING[kind][0][1]
    both = seeded(model, signature)
    spec = zoo.validate(zoo.AnyModelSpec, model)
    torch.manual_seed(0)
    halves = {"generator": spec.build_generator(signature), "discriminator": spec.build_discriminator(signature)}
    weights = {f"{name}.{key}": value for name, half in halves.items() for key, value in half.state_dict().items()}
    assert list(weights) == list(both.state_dict())
    assert all(torch.equal(weights[key], value) for key, value in both.state_dict().items())


@matrix
def test_a_spec_survives_its_dump(model, signature):
    spec = zoo.validate(zoo.AnyModelSpec, model)
    assert zoo.validate(zoo.AnyModelSpec, spec.model_dump(mode="json")) == spec
    assert zoo.validate(zoo.AnyModelSpec, spec.model_dump(mode="json", exclude_unset=True)) == spec


@pytest.mark.parametrize("kind", ["cnn", "alexnet", "dcgan", "conditional_gan", "pix2pix", "conv_autoencoder"])
def test_image_models_refuse_features(kind):
    with pytest.raises(UserError) as refusal:
        zoo.build({"kind": kind}, features)
    assert str(refusal.value) == (
        f"model.kind: {kind} reads image input, but the data has features input of shape (12,); "
        "choose another model or data set"
    )


INPUTS = [
    Features(size=12),
    Image(shape=(1, 8, 8)),
    Sequence(width=4, length=5),
    Tokens(size=9),
    Tree(size=9),
    Scene(width=4, degree=2, names=("a", "b")),
]
UNREAD = [
    pytest.param(kind, column, id=f"{kind}-{column.kind}")
    for kind, spec in zoo.MODELS.items()
    for column in INPUTS
    if kind != "custom" and "input" in spec.reads and not isinstance(column, spec.reads["input"])
]


@pytest.mark.parametrize(("kind", "column"), UNREAD)
def test_input_of_another_kind_is_refused(kind, column):
    signature = Signature(columns={"input": column, "target": Label(size=2)})
    with pytest.raises(UserError, match=rf"model\.kind: {kind} reads .*but the data has {column.kind} input "):
        zoo.build({"kind": kind}, signature)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "alexnett"}, "model.kind: unknown kind 'alexnett'; did you mean alexnet?"),
        ({}, "model.kind: missing; say which kind it is"),
        ("mlp", "model: must be a section of fields, not 'mlp'"),
        ({"kind": "cnn", "dropoutt": 0.1}, "model.dropoutt: unknown field; did you mean dropout?"),
        (
            {"kind": "cnn", "kernel_size": 4},
            "model.kernel_size: must be odd, to pad both sides alike, not 4; set 3 or 5",
        ),
        ({"kind": "cnn", "channels": []}, "model.channels: "),
        ({"kind": "mlp", "hidden": [64, 0]}, "model.hidden.1: must be greater than 0, not 0"),
        ({"kind": "mlp", "dropout": 1}, "model.dropout: must be less than 1, not 1"),
        ({"kind": "custom"}, "model.target: missing; it has no default, so set it"),
        (
            {"kind": "custom", "target": "my_package.MyNet"},
            "model.target: must name a module and a class in it, like my_package.nets:MyNet, not 'my_package.MyNet'",
        ),
        (
            {"kind": "custom", "target": "my_package.nets:MyNet"},
            "model.target: cannot import my_package.nets: No module named 'my_package'; "
            "install it, or put its folder on PYTHONPATH",
        ),
        (
            {"kind": "custom", "target": f"{__name__}:TinyNt"},
            f"model.target: {__name__} has no TinyNt; did you mean TinyNet?",
        ),
        (
            {"kind": "custom", "target": f"{__name__}:not_a_net"},
            f"model.target: {__name__}:not_a_net is 3; "
            "name a class derived from torch.nn.Module, or a function annotated to return one",
        ),
        (
            {"kind": "custom", "target": f"{__name__}:make_nothing"},
            f"model.target: {__name__}:make_nothing returned None; it must return a torch.nn.Module",
        ),
        (
            {"kind": "custom", "target": TINY, "arguments": {"widht": 3}},
            f"model.arguments: {TINY} does not take {{'widht': 3}}: got an unexpected keyword argument 'widht'",
        ),
        (
            {"kind": "custom", "target": f"{__name__}:BrokenNet"},
            f"model.arguments: {__name__}:BrokenNet does not take {{}}: broken inside",
        ),
    ],
)
def test_a_wrong_description_is_refused_with_path_value_and_fix(model, message):
    with pytest.raises(UserError) as refusal:
        zoo.build(model, fashion)
    assert str(refusal.value).startswith(message)


def test_custom_finds_a_module_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "users_nets.py").write_text("from torch import nn\n\nclass MyNet(nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = {"in_features": 12, "out_features": 3}
    module = zoo.build({"kind": "custom", "target": "users_nets:MyNet", "arguments": arguments}, features)
    assert type(module).__name__ == "MyNet"


@pytest.mark.parametrize("name", ["not_annotated", "of_no_module", "of_nobody_knows_what"])
def test_custom_calls_no_function_that_does_not_say_it_returns_a_module(name):
    message = rf"{name} is a function not annotated .* write `def {name}\(…\) -> nn.Module:`"
    with pytest.raises(UserError, match=message):
        zoo.CustomSpec(target=f"{__name__}:{name}").build(features)  # as a run's model is loaded, without check()
    assert not CALLED


def test_custom_runs_no_commands(tmp_path):
    arguments = {"args": f"touch {tmp_path / 'here'}", "shell": True}
    for target in ("subprocess:run", "subprocess:Popen", "os:system", "builtins:eval"):
        with pytest.raises(UserError, match=rf"model\.target: {target} is "):
            zoo.CustomSpec(target=target, arguments=arguments).build(features)
    assert not list(tmp_path.iterdir())


def test_custom_arguments_are_checked_before_anything_is_built():
    with pytest.raises(UserError, match=r"model\.arguments: "):
        zoo.CustomSpec(target=TINY, arguments={"widht": 3}).check(fashion)
    zoo.CustomSpec(target=f"{__name__}:BrokenNet").check(fashion)  # what it does when called, check cannot know


def test_build_takes_a_spec():
    assert isinstance(zoo.build(zoo.MODELS["mlp"](), features), nn.Module)
    assert isinstance(nn_models.build({"kind": "mlp"}, nn_models.Signature(input_shape=(2,), num_outputs=1)), nn.Module)


@pytest.mark.parametrize("kind", zoo.MODELS)
def test_every_kind_and_field_is_described(kind):
    summary = tables.summaries()[kind]
    assert summary.endswith(".")
    assert len(summary) < 100
    assert summary != ModelSpec.__doc__
    table = tables.field_table(kind)
    assert [row.name for row in table] == [name for name in zoo.MODELS[kind].model_fields if name != "kind"]
    assert all(row.type and row.default and row.description for row in table)


def test_field_table():
    table = {row.name: row for row in tables.field_table("cnn")}
    assert table["channels"][1:3] == ("list of int > 0", "[32, 64]")
    assert table["dropout"][1:3] == ("float >= 0, < 1", "0.0")
    assert table["pooling"][1:3] == ("max | average", "max")
    assert table["batch_norm"][1:3] == ("true | false", "false")
    assert tables.field_table("custom")[0].default == "required"
    with pytest.raises(UserError, match=r"cnnn: unknown kind of model; did you mean cnn\?"):
        tables.field_table("cnnn")


def test_the_package_exports_what_it_lists():
    assert dir(nn_models) == sorted(nn_models.__all__)
    assert all(getattr(nn_models, name) is not None for name in nn_models.__all__)
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        nn_models.biuld  # noqa: B018  # the access is the test


def test_importing_is_cheap():
    code = (
        "import sys, nn_models; assert not {'torch', 'pydantic'} & set(sys.modules); "
        "import nn_models.spec; assert 'torch' not in sys.modules; "
        "import nn_models.zoo, nn_models.objectives; assert not {'torchvision', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
