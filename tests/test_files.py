"""Files that may be anything: read as they were written, or refused by name; written whole, or not at all."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch

import lightning_transfer as lt
from lightning_transfer.files import write_atomically
from lightning_transfer.methods.collaborative.search.plan import Evaluation
from lightning_transfer.reports import gate_map, layer_search, learning_curves
from lightning_transfer.stamps import KEYS, stamped
from tests import toys
from tests.selective.select_run import made_selection
from tests.toys import LitToy, SaveEveryStep, fit

PLAN = lt.LayerPlan(
    {"own": 2, "source1": 0},
    {"own": 4, "source1": 9},
    (Evaluation((1, 4), 0.5), Evaluation((2, 0), 0.75), Evaluation((3, 2), None, "no memory")),
    {"seed": "0"},
)
READERS = {
    "selection": lt.Selection.load,
    "plan": lt.LayerPlan.load,
    "frozen": lambda path: lt.CollaborativeFinetuning([toys.OtherNet()], frozen_layers=str(path)),
    "checkpoint": lambda path: lt.load_from_checkpoint(LitToy, path),
    "trusted": lambda path: lt.load_from_checkpoint(LitToy, path, weights_only=False),
    "strip": lambda path: lt.strip_checkpoint(path, f"{path}.out"),
}
WRITERS = {
    "selection": lambda path: made_selection().save(path),
    "plan": PLAN.save,
    "strip": lambda path: lt.strip_checkpoint("plain.ckpt", path),
    "picture": lambda path: layer_search(PLAN, path),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def strange(name):
    """Makes something that this package did not write, and gives its path."""
    if name == "missing":
        return "missing"
    if name == "folder":
        os.mkdir("folder.png")
        return "folder.png"
    if name == "pipe":
        os.mkfifo("pipe.png")
        return "pipe.png"
    if name == "device":
        os.symlink("/dev/null", "device.png")
        return "device.png"
    if name == "NUL":
        return "a\0b"
    if name == "long":
        return "x" * 5000
    if name == "surrogate":
        return "\ud800"
    if name in ("named", "callbacks"):
        odd = {"state_dict": {1: torch.ones(2)}} if name == "named" else {"state_dict": {}, "callbacks": None}
        torch.save(odd, "file")
        return "file"
    contents = {
        "empty": b"",
        "code": b"import os\n",
        "class": b"class A:\n    pass\n",
        "text": b"not what it should be\n" * 9,
        "json": b'{"a": 1}',
        "null": b"null",
        "deep": b"[" * 100_000,
        "unicode": b"\xff\xfe\x00",
        "zip": b"PK\x03\x04" + bytes(99),
        "pickle": b"\x80\x02}q\x00.",
        "zeros": bytes(4096),
        "header": (2**63).to_bytes(8, "little"),
    }
    Path("file").write_bytes(contents[name])
    return "file"


KINDS = ("missing", "folder", "pipe", "device", "NUL", "long", "surrogate")
CONTENTS = ("empty", "code", "class", "text", "json", "null", "deep", "unicode", "zip", "pickle", "zeros", "header")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", [*KINDS, *CONTENTS])
def test_what_is_not_a_file_of_ours_is_refused_by_name(kind, reader):
    """D17."""
    path = strange(kind)
    caught = []

    def read():
        with pytest.raises(lt.TransferConfigError) as error:
            READERS[reader](path)
        caught.append(str(error.value))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)  # a pipe would wait for ever
    assert caught
    assert caught[0].encode()  # it can be printed
    name = "file" if kind in CONTENTS else path.replace("\ud800", "\\ud800")[:99]
    assert name in caught[0]


@pytest.mark.parametrize("kind", ["code", "class", "named", "callbacks"])
def test_what_is_not_a_checkpoint_is_not_called_one_that_holds_more_than_plain_data(kind):
    with pytest.raises(lt.TransferConfigError, match="file is not a Lightning checkpoint") as error:
        READERS["strip"](strange(kind))
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("reader", ["selection", "plan", "frozen"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(reader, monkeypatch):
    def denied(self):
        raise PermissionError("Permission denied")

    Path("file").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(lt.TransferConfigError, match=r"^file cannot be read: Permission denied\.$"):
        READERS[reader]("file")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99])
def test_a_truncated_checkpoint_is_refused_by_name(share):
    """D17."""
    fit(LitToy(), [SaveEveryStep(Path())], max_steps=1)
    data = Path("step=1.ckpt").read_bytes()
    Path("file").write_bytes(data[: int(share * len(data))])
    for reader in ("checkpoint", "trusted", "strip"):
        with pytest.raises(lt.TransferConfigError, match="file is not a Lightning checkpoint, or it is damaged"):
            READERS[reader]("file")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "NUL", "long", "surrogate", "below"])
def test_what_cannot_be_written_is_refused_by_name_and_leaves_nothing(kind, writer):
    """D17."""
    torch.save({"state_dict": {}, "lightning_transfer": {}}, "plain.ckpt")
    Path("below").write_text("")
    path = "below/a" if kind == "below" else strange(kind)
    with pytest.raises(lt.TransferConfigError, match="Cannot write the .*Pass another|Choose another"):
        WRITERS[writer](path)
    assert {*os.listdir()} - {"folder.png", "pipe.png", "device.png"} == {"below", "plain.ckpt"}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_stays_one_and_what_it_names_is_written(writer):
    """D17."""
    torch.save({"state_dict": {}, "lightning_transfer": {}}, "plain.ckpt")
    os.makedirs("elsewhere")
    os.symlink("elsewhere/real.png", "link.png")
    for content in (None, b"old"):
        if content is not None:
            Path("elsewhere/real.png").write_bytes(content)
        WRITERS[writer]("link.png")
        assert os.path.islink("link.png")
        assert Path("elsewhere/real.png").stat().st_size > 3
        assert [path.name for path in Path("elsewhere").iterdir()] == ["real.png"]


@pytest.mark.parametrize("writer", ["selection", "plan", "strip"])  # matplotlib does not promise to draw in threads
def test_two_that_write_at_once_do_not_share_a_name_and_a_long_name_has_room(writer):
    torch.save({"state_dict": {}, "lightning_transfer": {}}, "plain.ckpt")
    name = "x" * 251 + ".png"
    threads = [threading.Thread(target=WRITERS[writer], args=(name,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {*os.listdir()} == {name, "plain.ckpt"}


def test_an_error_in_the_writing_is_not_hidden_and_leaves_nothing():
    with pytest.raises(KeyboardInterrupt):
        write_atomically("file", interrupt, what="the file", fix="")
    with pytest.raises(ZeroDivisionError):
        write_atomically("file", lambda file: 1 / 0, what="the file", fix="")
    assert os.listdir() == []


def interrupt(file):
    file.write(b"half")
    raise KeyboardInterrupt


def pictures(path):
    yield lambda: layer_search(PLAN, path)
    yield lambda: learning_curves({"plain": [[0.2, 0.5]]}, [10, 20], path)
    images = torch.rand(9, 3, 8, 8)
    yield lambda: made_selection().report(path, target=images[:4], source=images)


def test_a_picture_goes_into_a_new_folder_and_an_ending_that_is_not_one_is_named():
    """D17."""
    for draw in pictures("new/x.png"):
        draw()
        assert Path("new/x.png").read_bytes().startswith(b"\x89PNG")
        os.remove("new/x.png")
    for draw in pictures("r.html"):
        with pytest.raises(lt.TransferConfigError, match=r"cannot end in \.html. Known: .*pdf, .*png"):
            draw()
    next(pictures("page"))()
    assert {*os.listdir()} == {"new", "page.png"}


def test_class_names_that_are_not_text_are_drawn():
    """D17."""
    images = torch.rand(9, 3, 8, 8)
    names = ["caf\udce9", "\ud800", "$x_$", "ok", *map(str, range(9))]
    given = {"target_names": names, "source_names": names, "target": images[:4], "source": images}
    made_selection().report("page.png", **given)
    module = LitToy()
    fit(module, [lt.AdaFilter(gated="model.conv", gate_width=4)], max_steps=1)
    gate_map(module, toys.target_loader(), "gates.png", class_names=names)
    assert {*os.listdir()} == {"page.png", "gates.png"}


def with_header(change):
    """A selection whose header is changed, and the tensors left as they are."""
    made_selection().save("file")
    data = Path("file").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    Path("file").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "F4", "BOOL", "U64", "C64", "what", None, 7])
def test_a_selection_with_another_type_in_its_header_is_refused(dtype):
    """D17."""
    with_header(lambda header: header["indices"].update(dtype=dtype))
    with pytest.raises(lt.TransferConfigError, match="file is .*Delete it and select again"):
        lt.Selection.load("file")


@pytest.mark.parametrize("metadata", [None, [], "", {}, {"format": None}, {"format": "2", "fingerprint": None}])
def test_a_selection_with_other_metadata_is_refused(metadata):
    """D17."""
    with_header(lambda header: header.update(__metadata__=metadata))
    with pytest.raises(lt.TransferConfigError, match="file is .*Delete it and select again"):
        lt.Selection.load("file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["evaluations"][1].update(accuracy=7.0), "accuracy=7.0"),
        (lambda data: data["evaluations"][1].update(accuracy=-0.1), "accuracy=-0.1"),
        (lambda data: data["evaluations"][1].update(accuracy=float("nan")), "accuracy=nan"),
        (lambda data: data["evaluations"][1].update(accuracy="0.9"), "accuracy='0.9'"),
        (lambda data: data["evaluations"][1].update(accuracy=True), "accuracy=True"),
        (lambda data: data["evaluations"][1].update(layers=[2, 10]), "layers=10"),
        (lambda data: data["evaluations"][1].update(layers=[2]), "LayerPlan"),
        (lambda data: data["evaluations"][1].update(layers=[2.5, 1]), "layers=2.5"),
        (lambda data: data["evaluations"][1].update(failure=None), "failure=None"),
        (lambda data: data["evaluations"][1].pop("failure"), "LayerPlan"),
        (lambda data: data["evaluations"][1].update(layers=[4, 0]), "layers=4.*at most 3"),
        (lambda data: data["frozen"].update(own=4), "frozen.*own.*=4.*at most 3"),  # all but the last convolution
        (lambda data: data["frozen"].update(own=-1), "frozen.*own.*=-1"),
        (lambda data: data["frozen"].update(own="2"), "frozen.*own.*='2'"),
        (lambda data: data["frozen"].update(other=1), "freezes"),
        (lambda data: data["num_layers"].update(own=4.0), "num_layers.*own.*=4.0"),
        (lambda data: data["settings"].update(seed=0), "settings.*seed.*=0"),
        (lambda data: data.update(evaluations=None), "LayerPlan"),
        (lambda data: data.pop("settings"), "LayerPlan"),
    ],
)
def test_a_plan_that_no_search_could_find_is_refused_whatever_its_checksum(change, message):
    """D7."""
    data = {key: value for key, value in PLAN.as_data().items() if key not in KEYS}
    change(data)
    Path("plan.json").write_text(json.dumps(stamped(data)))
    with pytest.raises(lt.TransferConfigError, match=message):
        lt.LayerPlan.load("plan.json")


def test_a_plan_of_before_checksums_is_refused_and_says_so():
    """D7."""
    old = {key: value for key, value in PLAN.as_data().items() if key not in KEYS}
    Path("plan.json").write_text(json.dumps({"format": 1, "version": "0.1", **old}))
    with pytest.raises(lt.TransferConfigError, match=r"plan.json was written by lightning_transfer 0\.1 \(format 1\)"):
        lt.LayerPlan.load("plan.json")


def test_a_plan_is_read_as_it_was_written():
    PLAN.save("plan.json")
    assert lt.LayerPlan.load("plan.json") == PLAN
    assert lt.LayerPlan.from_data(PLAN.as_data()) == PLAN


class Holding(LitToy):
    """Its hyperparameters hold more than plain data."""

    def __init__(self, network, path):
        super().__init__()
        self.save_hyperparameters()
        self.model = network


HOLDERS = {
    "soft": lambda: lt.SoftFinetuning(lt.SourceTask(toys.source_data(), num_classes=7), weight=lt.Schedule(1.0, 1.0)),
    "adafilter": lambda: lt.AdaFilter(gated="model.conv", gate_width=4),
    "gated": lambda: lt.GatedTransfer(ratio=2, tap="model.bn"),
}


@pytest.mark.parametrize("method", HOLDERS)
@pytest.mark.filterwarnings("ignore:Attribute 'network' is an instance of `nn.Module`")
def test_hyperparameters_that_are_not_plain_ask_for_weights_only_false_and_for_no_class(method):
    """M1."""
    module = Holding(toys.toy_net(), Path("data"))
    fit(module, [HOLDERS[method](), SaveEveryStep(Path())], max_steps=1)
    for read in (READERS["checkpoint"], READERS["strip"]):
        with pytest.raises(lt.TransferConfigError, match=r"pass weights_only=False; .*never do it with a") as error:
            read("step=1.ckpt")
        assert "safe_globals" not in str(error.value)
        assert "lightning_transfer" not in str(error.value)
    loaded = lt.load_from_checkpoint(Holding, "step=1.ckpt", weights_only=False)
    toys.assert_same(toys.weights(loaded), toys.weights(module))
    if method == "soft":
        lt.strip_checkpoint("step=1.ckpt", "plain.ckpt", weights_only=False)
        assert "lightning_transfer" not in torch.load("plain.ckpt", weights_only=False)
