"""A run that resumes anywhere is the run that was never stopped, to the bit."""

import copy
import functools
import json
import signal

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import lightning_transfer as lt
from lightning_transfer.source.redrawing import READINGS
from tests import processes, toys
from tests.contracts import killed_run
from tests.methods import METHODS, UNTIL, chosen, each, one
from tests.toys import LitToy, Recorder, SaveEveryStep, StatefulLoader, assert_same, fit, weights

each_method = each()
STEPS = 12
KILLED_AT = 3


@each_method
def test_resume_after_every_step_equals_the_uninterrupted_run(method, tmp_path):
    """Cuts in mid-epoch, at an epoch's last batch, when the weight has reached 0, and resumed twice."""
    data = Recorder(toys.source_data())
    whole = LitToy()
    fit(whole, [method.callback(data), SaveEveryStep(tmp_path)], loader=StatefulLoader())
    assert len(data.loaded) == (4 * UNTIL if method.has_source else 0)
    for cut in range(1, STEPS):
        rest = Recorder(toys.source_data())
        module = LitToy()
        callback = method.callback(rest)
        path = tmp_path / f"step={cut}.ckpt"
        fit(module, [callback], loader=StatefulLoader(), ckpt_path=path)
        assert_same(weights(module), weights(whole))
        assert module.losses == whole.losses[cut:]
        is_checked = method.name.startswith("soft") and cut < UNTIL  # a selection is checked by unaugmented images
        assert rest.loaded == data.loaded[:4] * READINGS * is_checked + data.loaded[4 * cut :]


@each_method
def test_resume_of_a_resumed_run(method, tmp_path):
    whole = LitToy()
    fit(whole, [method.callback(), SaveEveryStep(tmp_path / "a")], loader=StatefulLoader())
    again = [method.callback(), SaveEveryStep(tmp_path / "b")]
    fit(LitToy(), again, loader=StatefulLoader(), ckpt_path=tmp_path / "a/step=2.ckpt")
    module = LitToy()
    fit(module, [method.callback()], loader=StatefulLoader(), ckpt_path=tmp_path / "b/step=4.ckpt")
    assert_same(weights(module), weights(whole))


@each(has_source=True)
def test_the_source_follows_a_batch_size_that_changes(method, tmp_path):
    """A reloaded train loader has as many images in a step as it says then, in a resumed run too."""

    class Growing(LitToy):
        def train_dataloader(self):
            return toys.target_loader(batch_size=4 * (self.current_epoch + 1))

    def run(callbacks=(), **options):
        module, callback = Growing(), method.always(0.5, batch_size=None)
        runner = toys.trainer([callback, *callbacks], reload_dataloaders_every_n_epochs=1)
        runner.fit(module, **options)
        return module, callback.part.get_extra_state()["position"]

    whole, position = run([SaveEveryStep(tmp_path)])
    resumed, again = run(ckpt_path=tmp_path / "step=6.ckpt")
    assert position == again == 2 * len(toys.target_data())
    assert_same(weights(resumed), weights(whole))


@each_method
def test_a_resumed_run_may_begin_with_other_weights(method, tmp_path):
    """A script that resumes need not load pretrained weights; what a method remembers of them is in the checkpoint."""
    whole, module = LitToy(), LitToy()
    fit(whole, [method.callback(), SaveEveryStep(tmp_path)], loader=StatefulLoader())
    with torch.no_grad():
        for value in module.state_dict().values():
            value += 1
    fit(module, [method.callback()], loader=StatefulLoader(), ckpt_path=tmp_path / "step=3.ckpt")
    assert_same(weights(module), weights(whole))


WAYS = [
    *((method, "callback") for method in METHODS),
    *((method, "mixin") for method in chosen(has_mixin=True)),
    *((method, "workers") for method in chosen(has_source=True, is_joint=False)),
]


@pytest.mark.parametrize(("method", "way"), WAYS, ids=str)
def test_kill_nine_and_resume(method, way, tmp_path):
    """The same weights, losses and source images, random augmentation included, as the run that was not killed."""

    def run(name, **options):
        (tmp_path / name).mkdir(exist_ok=True)
        train = functools.partial(killed_run.train, method.name, way, tmp_path / name, **options)
        return processes.run(train)[0].code

    assert run("whole") == 0
    assert run("killed", kill_at=KILLED_AT) == -signal.SIGKILL
    assert run("killed", ckpt_path=tmp_path / "killed/last.ckpt") == 0
    whole, resumed = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    )
    assert [entry["step"] for entry in whole] == list(range(STEPS))
    assert resumed == whole
    if way != "mixin":
        assert all(entry["losses"] for entry in whole)
        drawn = [bool(entry["source"]) for entry in whole]
        assert drawn == [method.has_source and step < UNTIL for step in range(STEPS)]


def test_resume_with_other_options_is_refused_with_the_differences(tmp_path):
    fit(LitToy(), [one(has_source=True).callback(), SaveEveryStep(tmp_path)], max_epochs=1)
    other = lt.SoftFinetuning(
        lt.SourceTask(toys.images(9, 7, seed=0), head=toys.source_head(), seed=4),
        weight=lt.Schedule(0.5, shape="cosine"),
    )
    with pytest.raises(lt.TransferConfigError) as caught:
        fit(LitToy(), [other], ckpt_path=tmp_path / "step=6.ckpt")
    message = str(caught.value)
    for difference in (
        "source images: 20 in the checkpoint, 9 now",
        "source seed: 0",
        "weight: 1 to 0",
        "weight shape",
    ):
        assert difference in message
    assert "To begin a new run from its weights" in message


@each_method
def test_state_of_another_version_is_refused_with_both_versions(method, tmp_path):
    fit(LitToy(), [method.callback(), SaveEveryStep(tmp_path)], max_epochs=1)
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    checkpoint["lightning_transfer"] |= {"format": 0, "version": "0.0.1"}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(lt.TransferConfigError, match=r"lightning_transfer 0\.0\.1 .*this is"):
        fit(LitToy(), [method.callback()], ckpt_path=tmp_path / "old.ckpt")
    with pytest.raises(lt.TransferConfigError, match=r"0\.0\.1"):
        lt.load_from_checkpoint(LitToy, tmp_path / "old.ckpt")


@pytest.mark.parametrize("cut", [2, 6, 8], ids=["in-it", "at-its-end", "after-it"])
def test_resume_around_a_warm_up(cut, tmp_path):
    callback = one(name="gated").callback()
    callback.warmup_epochs = 1
    whole, module = LitToy(), LitToy()
    fit(whole, [copy.deepcopy(callback), SaveEveryStep(tmp_path)], loader=StatefulLoader())
    fit(module, [callback], loader=StatefulLoader(), ckpt_path=tmp_path / f"step={cut}.ckpt")
    assert_same(weights(module), weights(whole))
    assert module.losses == whole.losses[cut:]


@each(has_mixin=True)
def test_mixin_resumes_exactly(method, tmp_path):
    whole = method.mixin()
    fit(whole, [SaveEveryStep(tmp_path)], loader=StatefulLoader())
    for cut in (2, 6, 9):
        module = method.mixin()
        fit(module, loader=StatefulLoader(), ckpt_path=tmp_path / f"step={cut}.ckpt")
        found, expected = (tree_map_only(Tensor, Tensor.tolist, dict(it.state_dict())) for it in (module, whole))
        assert found == expected
