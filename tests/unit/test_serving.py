"""Serving, without Ray: what requests may hold, what is answered, and how what is wrong is refused."""

import asyncio
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import cluster
from cluster.inference.serving import check_installed
from cluster.inference.serving.app import PAGE, Measures, site
from cluster.inference.serving.requests import MOST_PIXELS, Limits
from cluster.inference.serving.served import MOST_ELEMENTS, Served
from nn_models.errors import UserError
from tests.unit import made

FEW = {"epochs": 1, "global_batch_size": 64}
LISTOPS = {"kind": "listops", "rows": 200, "depth": 2, "length": 12}
LIMITS = Limits(body_bytes=100_000, rows=8, body_s=0.2)
TOKEN = "a token of the tests"
MEASURES = Measures()


class Alone:
    """A replica without others."""

    def __init__(self, served: Served) -> None:
        self.served = served

    async def answer(self, served, rows):
        return served.answers([rows])[0]

    async def swap(self, run):
        self.served = Served(run)
        return self.served.described()


class Site:
    """Sends requests to the application, without a network."""

    def __init__(self, served: Served, **options: Any) -> None:
        self.replica = Alone(served)
        self.app = site(self.replica, measures=MEASURES, **{"token": None, "limits": LIMITS, **options})

    def ask(self, method: str, path: str, body: Any = b"", kind: str | None = None, **headers: str):
        """(status, what is answered, its headers)."""
        if not isinstance(body, bytes | list):
            body, kind = json.dumps(body).encode(), kind or "application/json"
        pieces = list(body) if isinstance(body, list) else [body]
        found: dict[str, Any] = {"body": b""}

        async def receive():
            if not pieces:
                await asyncio.sleep(60)
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces) or isinstance(body, list)}

        async def send(message):
            found.update({name: value for name, value in message.items() if name != "body"})
            found["body"] += message.get("body", b"")

        told = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        told += [(b"content-type", kind.encode())] if kind else []
        scope = {"type": "http", "method": method, "path": path, "headers": told, "query_string": b""}
        scope |= {"scheme": "http", "server": ("127.0.0.1", 8000), "root_path": ""}
        asyncio.run(self.app(scope, receive, send))
        content = found["body"]
        answered = {name.decode(): value.decode() for name, value in found["headers"]}
        is_json = answered.get("content-type") == "application/json"
        return found["status"], json.loads(content) if is_json else content, answered

    def predict(self, body: Any, kind: str | None = None, **headers: str):
        status, told, _ = self.ask("POST", "/predict", body, kind, **headers)
        return status, told


def train(folder, **recipe) -> str:
    return cluster.train({"train": FEW, **recipe}, run=str(folder)).run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def digits(folder) -> Served:
    net = {"kind": "cnn", "channels": [4], "hidden": [8]}
    return Served(train(folder / "digits", model=net, data={"kind": "digits"}))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8), dtype=np.uint8)


def png(pixels: np.ndarray, size: int | None = None) -> bytes:
    image, buffer = Image.fromarray(pixels[0]), io.BytesIO()
    image.resize((size or 8, size or 8), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def test_rows_are_answered_as_open_model_answers_them(digits, pixels):
    status, told = Site(digits).predict({"rows": pixels.tolist()})
    assert status == 200
    model = cluster.open_model(digits.run)
    assert [answer["class"] for answer in told["predictions"]] == model.predict(pixels)
    chances = model(pixels).softmax(1)
    assert torch.equal(torch.tensor([answer["probability"] for answer in told["predictions"]]), chances.max(1).values)
    for answer, row in zip(told["predictions"], chances, strict=True):
        most = [(model.classes[place], float(row[place])) for place in row.argsort(descending=True)[:5]]
        assert [(one["class"], one["probability"]) for one in answer["top"]] == most


def test_many_requests_in_one_pass_each_get_their_own(digits, pixels):
    requests = [digits.checked(pixels[first:last].tolist()) for first, last in ((0, 1), (1, 4), (4, 6))]
    answers = digits.answers(requests)
    assert [len(each) for each in answers] == [1, 3, 2]
    alone = digits.answers([digits.checked(pixels.tolist())])[0]
    for one, other in zip([answer for each in answers for answer in each], alone, strict=True):
        assert one["class"] == other["class"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)  # float32, another batch size


def test_divided_pixels_are_refused_among_requests_that_are_right(digits, pixels):
    assert digits.checked(pixels.tolist()).shape == (6, 1, 8, 8)
    with pytest.raises(UserError, match="divided already"):
        digits.checked((pixels / 255).tolist())


@pytest.mark.parametrize("size", [8, 40])
def test_a_picture_is_resized_to_what_the_model_reads(digits, pixels, size):
    status, told = Site(digits).predict(png(pixels[0], size), "image/png")
    assert status == 200
    if size == 8:
        assert told == Site(digits).predict({"rows": pixels[:1].tolist()})[1]


def form(*files: bytes) -> tuple[bytes, str]:
    parts = [
        b'--line\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + file + b"\r\n"
        for file in files
    ]
    return b"".join(parts) + b"--line--\r\n", "multipart/form-data; boundary=line"


def test_a_form_may_hold_several_pictures(digits, pixels):
    status, told = Site(digits).predict(*form(*map(png, pixels)))
    assert (status, told) == Site(digits).predict({"rows": pixels.tolist()})


def bomb() -> bytes:
    """A small file of more pixels than are taken."""
    buffer = io.BytesIO()
    side = int(MOST_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = [[[[0] * 8] * 8]]
NOISE = np.random.default_rng(1).integers(0, 256, (1, 8, 8), dtype=np.uint8)
JSON = "application/json"
WRONG = {
    "no body": (b"", JSON, 400, "no JSON"),
    "half a body": (b'{"rows": [[', JSON, 400, "no JSON"),
    "not a number": (b'{"rows": [NaN]}', JSON, 400, "no JSON"),
    "no text": (b"\xff\xfe", JSON, 400, "no JSON"),
    "deep": (b"[" * 50_000, JSON, 400, "no JSON"),
    "a list": (b"[]", JSON, 422, "no object"),
    "other names": ({"row": GOOD}, None, 422, "an object of 'row'"),
    "more names": ({"rows": GOOD, "x": 1}, None, 422, "an object of"),
    "no rows": ({"rows": []}, None, 422, "an empty list"),
    "rows of nothing": ({"rows": None}, None, 422, "no list of rows"),
    "a word": ({"rows": "seven"}, None, 422, "no list of rows"),
    "a mapping": ({"rows": {"a": 1}}, None, 422, "no list of rows"),
    "words": ({"rows": ["seven"]}, None, 422, "no numbers"),
    "mappings": ({"rows": [{"a": 1}]}, None, 422, "no numbers"),
    "truth": ({"rows": [[[[True] * 8] * 8]]}, None, 422, "no numbers"),
    "one row": ({"rows": GOOD[0]}, None, 422, "of shape (1, 8, 8)"),
    "another shape": ({"rows": [[[[0] * 9] * 9]]}, None, 422, "of shape (1, 1, 9, 9)"),
    "ragged": ({"rows": [[[[0] * 8] * 7 + [[0]]]]}, None, 422, "different shapes"),
    "no bytes": ({"rows": [[[[256] * 8] * 8]]}, None, 422, "no bytes"),
    "huge": ({"rows": [[[[10**30] * 8] * 8]]}, None, 422, "no numbers"),
    "huge fraction": ({"rows": [[[[1e300] * 8] * 8]]}, None, 422, "no bytes"),
    "many": ({"rows": GOOD * 9}, None, 413, "9 rows"),
    "large": (b"x" * 100_001, JSON, 413, "more than 100,000 bytes"),
    "large in pieces": ([b"x" * 60_000] * 2, JSON, 413, "more than 100,000 bytes"),
    "slow": ([b"{"], JSON, 408, "did not come within 0.2 s"),
    "of no type": (b"{}", None, 415, "none"),
    "of another type": (b"a,b", "text/csv", 415, "text/csv"),
    "a text": (b"seven", "text/plain", 415, "a text"),
    "no picture": (b"seven", "image/png", 422, "in no known image format"),
    "half a picture": (png(NOISE)[:-40], "image/png", 422, "not a readable image"),
    "a bomb": (bomb(), "image/png", 413, "pixels"),
    "a form of nothing": (b"", "multipart/form-data; boundary=line", 422, "a form without files"),
    "a form without bounds": (b"abc", "multipart/form-data", 400, "no form"),
    "no form": (b"abc", "multipart/form-data; boundary=line", 400, "no form"),
    "many pictures": (*form(*[png(np.zeros((1, 8, 8), np.uint8))] * 9), 400, "no form"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_in_one_clear_answer(digits, what):
    body, kind, wanted, words = WRONG[what]
    status, told = Site(digits).predict(body, kind)
    assert status == wanted, told
    assert set(told) == {"error"}
    assert set(told["error"]) == {"path", "message", "fix"}
    assert words in told["error"]["message"]
    assert len(told["error"]["message"]) < 600


def test_a_length_that_is_told_is_refused_before_anything_is_read(digits):
    status, told = Site(digits).predict([b""], JSON, content_length="999999999")
    assert status == 413, told
    assert Site(digits).predict(b"{}", JSON, content_length="-1")[0] == 413


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), st.lists, max_leaves=20))
def test_no_rows_whatever_they_are_make_the_server_fail(digits, rows):
    status, told = Site(digits).predict({"rows": rows})
    assert status in (413, 422), told


def test_who_has_no_token_gets_nothing(digits):
    guarded = Site(digits, token=TOKEN)
    for method, path in (("POST", "/predict"), ("GET", "/model"), ("POST", "/model"), ("GET", "/metrics")):
        for given_token in (None, "", "Bearer ", "Bearer another", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe4"):
            headers = {} if given_token is None else {"authorization": given_token}
            status, told, answered = guarded.ask(method, path, {"rows": GOOD}, **headers)
            assert status == 401, (path, given_token)
            assert answered["www-authenticate"] == "Bearer"
            assert TOKEN not in json.dumps(told)
    assert guarded.predict({"rows": GOOD}, authorization=f"Bearer {TOKEN}")[0] == 200
    assert guarded.ask("GET", "/health")[:2] == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("LOCALHOST", 200),
        ("[::1]:8000", 200),
        ("127.0.0.2", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("[::2]", 403),
        ("127.0.0.1@evil.example", 403),
    ],
)
def test_without_a_token_pages_of_other_sites_are_refused(digits, host, status):
    assert Site(digits).predict({"rows": GOOD}, host=host)[0] == status
    assert Site(digits).ask("GET", "/model", host=host)[0] == status
    assert Site(digits, token=TOKEN).predict({"rows": GOOD}, host=host)[0] == 401  # whose token it takes anyway


def test_the_page_holds_nothing_of_the_model(digits):
    status, page, headers = Site(digits, token=TOKEN).ask("GET", "/")
    assert (status, page) == (200, PAGE.read_bytes())
    assert "default-src 'none'" in headers["content-security-policy"]


def test_another_run_is_taken_with_a_token_only(folder, digits):
    other = train(folder / "other", model={"kind": "mlp", "hidden": [4]}, data={"kind": "digits"})
    closed = Site(digits)
    status, told, _ = closed.ask("POST", "/model", {"run": other})
    assert status == 403
    assert "MANTA_SERVE_TOKEN" in told["error"]["fix"]
    mine, bearer = Site(digits, token=TOKEN), {"authorization": f"Bearer {TOKEN}"}
    for wrong in ({}, {"run": 3}, {"run": other, "x": 1}, other):
        assert mine.ask("POST", "/model", wrong, **bearer)[0] == 422
    status, told, _ = mine.ask("POST", "/model", {"run": str(folder / "nowhere")}, **bearer)
    assert status == 422
    assert "nowhere" in told["error"]["path"]
    assert mine.ask("GET", "/model", **bearer)[1]["run"] == digits.run
    status, told, _ = mine.ask("POST", "/model", {"run": other}, **bearer)
    assert (status, told["run"], told["model"]) == (200, other, "mlp")
    assert mine.predict({"rows": GOOD}, **bearer)[1]["run"] == other


@pytest.mark.parametrize(("method", "path", "wanted"), [("GET", "/nothing", 404), ("GET", "/predict", 405)])
def test_other_paths_and_methods(digits, method, path, wanted):
    status, told, _ = Site(digits).ask(method, path)
    assert status == wanted
    assert told["error"]["path"] == path


def test_what_nobody_foresaw_shows_no_traceback(digits, monkeypatch):
    monkeypatch.setattr(Served, "answers", lambda *_: 1 / 0)
    mine = Site(digits)
    with pytest.raises(ZeroDivisionError):  # for the server's log
        mine.predict({"rows": GOOD})


def test_what_is_described(digits):
    status, told, _ = Site(digits).ask("GET", "/model")
    assert status == 200
    assert (told["shape"], told["images"], told["texts"]) == ([1, 8, 8], True, False)
    assert told["classes"] == list("0123456789")
    assert told["limits"] == {"body_bytes": 100_000, "rows": 8, "body_s": 0.2}


# -- other rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["label", "numbers"])
def test_features_give_classes_or_numbers_in_their_units(folder, target):
    spec = made.features(folder / f"in-{target}", 240, target=target)
    kind = "classification" if target == "label" else "regression"
    run = train(folder / target, model={"kind": "mlp", "hidden": [4]}, data=spec, objective={"kind": kind})
    served, rows = Served(run), np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    status, told = Site(served).predict({"rows": rows.tolist()})
    assert status == 200
    wanted = cluster.open_model(run).predict(rows)
    if target == "label":
        assert [answer["class"] for answer in told["predictions"]] == wanted
    else:
        assert torch.equal(torch.tensor([answer["values"] for answer in told["predictions"]]), wanted)
    assert Site(served).predict({"rows": [[1e300, 0, 0, 0]]})[0] == 422
    assert Site(served).predict(png(np.zeros((1, 8, 8), np.uint8)), "image/png")[0] == 415


@pytest.fixture(scope="module")
def texts(folder) -> Served:
    """Lines whose words say what they are of."""
    words = {"good": "fine great fun", "bad": "dull poor flat"}
    rows = [{"text": f"a {word} film", "label": name} for name in words for word in words[name].split()] * 8
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"kind": "text_classification", "path": str(folder / "lines.jsonl")}
    return Served(train(folder / "texts", model={"kind": "gru", "hidden": 4}, data=data))


def test_a_text_is_a_row(texts):
    status, told = Site(texts).predict(b"a great film", "text/plain; charset=utf-8")
    assert status == 200
    (answer,) = told["predictions"]
    assert [answer["class"]] == cluster.open_model(texts.run).predict(["a great film"])
    many = {"rows": ["a great film", ["a", "great", "film"], "a dull film that nobody knew"]}
    status, told = Site(texts).predict(many)
    assert status == 200
    assert told["predictions"][0]["class"] == told["predictions"][1]["class"] == answer["class"]


@pytest.mark.parametrize(
    "row", ["", "   ", [], [[]], [3, "a"], [0.5], [-1], [10_000], 3, None, {"a": 1}, "a " * (MOST_ELEMENTS + 1)]
)
def test_what_is_no_text_is_refused(texts, row):
    with pytest.raises(UserError, match=r"^rows: "):
        texts.checked([row])


def test_texts_of_other_charsets(texts):
    assert Site(texts).predict("a great film".encode("utf-16"), "text/plain; charset=utf-16")[0] == 200
    assert Site(texts).predict(b"\xff\xff", "text/plain")[0] == 400
    assert Site(texts).predict(b"abc", "text/plain; charset=nothing")[0] == 400


def test_trees_one_of_which_is_wrong(folder):
    run = train(folder / "trees", model={"kind": "tree_lstm", "hidden": 5, "embedding": 4}, data=LISTOPS)
    served = Served(run)
    right, wrong = "((([MAX 2) 9) ])", "((2 3) 4"
    first, second = served.answers([served.checked([right, right]), served.checked([wrong])])
    assert [answer["class"] for answer in first] == cluster.open_model(run).predict([right, right])
    assert isinstance(second, UserError)
    status, told = Site(served).predict({"rows": [wrong]})
    assert status == 422
    assert "a bracket is opened and not closed" in told["error"]["message"]
    assert Site(served).predict(right.encode(), "text/plain")[1]["predictions"][0]["class"] == first[0]["class"]


def test_a_label_of_each_node(folder):
    recipe = {"data": {**LISTOPS, "labels": "nodes"}, "objective": {"kind": "node_labels"}}
    run = train(folder / "nodes", model={"kind": "tree_lstm", "hidden": 5, "embedding": 4}, **recipe)
    trees = ["((([MAX 2) 9) ])", "(([MAX 2) ])"]
    status, told = Site(Served(run)).predict({"rows": trees})
    assert status == 200
    model = cluster.open_model(run)
    assert [answer["classes"] for answer in told["predictions"]] == [model.predict([tree]) for tree in trees]
    assert [len(answer["probabilities"]) for answer in told["predictions"]] == [7, 5]


def test_a_parser_gives_trees(folder):
    net = {"kind": "parser", "hidden": 4, "embedding": 4}
    run = train(folder / "parser", model=net, data=LISTOPS, objective={"kind": "parsing"})
    status, told = Site(Served(run)).predict(b"[MAX 2 9 ]", "text/plain")
    assert status == 200
    assert [told["predictions"][0]["tree"]] == cluster.open_model(run).predict(["[MAX 2 9 ]"])


def test_a_forecaster_says_how_series_go_on(folder):
    (folder / "sea.csv").write_text("t,v\n" + "".join(f"{n},{np.sin(n)}\n" for n in range(200)))
    data = {"kind": "series", "path": str(folder / "sea.csv"), "target": "v", "window": 6, "horizon": 3}
    run = train(folder / "series", model={"kind": "gru", "hidden": 4}, data=data, objective={"kind": "forecast"})
    past = np.random.default_rng(0).normal(size=(2, 6, 1)).astype(np.float32)
    longer = [[[9.0]] * 3 + past[0].tolist(), past[1].tolist()]
    status, told = Site(Served(run)).predict({"rows": longer})
    assert status == 200
    assert told["predictions"][0]["columns"] == ["v"]
    steps = torch.tensor([answer["steps"] for answer in told["predictions"]])
    assert torch.allclose(steps, cluster.open_model(run).forecast(past), atol=1e-6)  # float32
    for wrong in ([[[1.0]] * 5], [[[1.0, 2.0]] * 6], [[1.0] * 6], [[[1e300]] * 6], [[]]):
        assert Site(Served(run)).predict({"rows": wrong})[0] == 422


@pytest.mark.parametrize(
    ("recipe", "use"),
    [
        ({"model": {"kind": "autoencoder", "code": 2}, "objective": {"kind": "reconstruction"}}, "manta encode"),
        ({"model": {"kind": "gan"}, "objective": {"kind": "adversarial"}}, "manta generate"),
    ],
)
def test_models_with_commands_of_their_own_are_refused(folder, recipe, use):
    spec = made.features(folder / "few", 60)  # of which a GAN's quality is soon measured
    run = train(folder / use.replace(" ", "-"), data=spec, **recipe)
    with pytest.raises(UserError, match=use):
        Served(run)


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    check_installed()
    monkeypatch.setattr("cluster.inference.serving.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'manta-train\[serve\]'"):
        check_installed()
