"""A run that resumes anywhere is the run that was never stopped, to the bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

import lightning_transfer as lt
from tests import toys
from tests.methods import METHODS, SOURCED, UNTIL
from tests.toys import LitToy, Recorder, SaveEveryStep, StatefulLoader, assert_same, fit, weights

each_method = pytest.mark.parametrize("method", METHODS, ids=str)
STEPS = 12


@each_method
def test_resume_after_every_step_equals_the_uninterrupted_run(method, tmp_path):
    """Cuts in mid-epoch, at an epoch's last batch, when the weight has reached 0, and resumed twice."""
    data = Recorder(toys.source_data())
    whole = LitToy()
    fit(whole, [method.callback(data), SaveEveryStep(tmp_path)], loader=StatefulLoader())
    assert len(data.loaded) == (4 * UNTIL if method in SOURCED else 0)
    for cut in range(1, STEPS):
        rest = Recorder(toys.source_data())
        module = LitToy()
        callback = method.callback(rest)
        path = tmp_path / f"step={cut}.ckpt"
        fit(module, [callback], loader=StatefulLoader(), ckpt_path=path)
        assert_same(weights(module), weights(whole))
        assert module.losses == whole.losses[cut:]
        assert rest.loaded == data.loaded[4 * cut :]


@each_method
def test_resume_of_a_resumed_run(method, tmp_path):
    whole = LitToy()
    fit(whole, [method.callback(), SaveEveryStep(tmp_path / "a")], loader=StatefulLoader())
    again = [method.callback(), SaveEveryStep(tmp_path / "b")]
    fit(LitToy(), again, loader=StatefulLoader(), ckpt_path=tmp_path / "a/step=2.ckpt")
    module = LitToy()
    fit(module, [method.callback()], loader=StatefulLoader(), ckpt_path=tmp_path / "b/step=4.ckpt")
    assert_same(weights(module), weights(whole))


def killed_run(folder, workers, kill_at, ckpt_path=None):
    """A run in a process of its own that writes each step's target loss and source images, and may kill itself."""
    script = pathlib.Path(__file__).with_name("killed_run.py")
    arguments = [str(folder), str(workers), str(kill_at), str(ckpt_path or "")]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    code = subprocess.run([sys.executable, script, *arguments], env=environment, check=False).returncode
    return code, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_nine_and_resume(workers, tmp_path):
    """The same losses and the same source images, random augmentation included, as the run that was not killed."""
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    code, whole = killed_run(folders[0], workers, kill_at=-1)
    assert code == 0
    code, killed = killed_run(folders[1], workers, kill_at=3)
    assert code == -signal.SIGKILL
    assert killed == whole[:4]
    code, resumed = killed_run(folders[1], workers, kill_at=-1, ckpt_path=folders[1] / "last.ckpt")
    assert code == 0
    steps = {entry["step"]: entry for entry in resumed}
    assert [steps[step] for step in sorted(steps)] == whole
    assert len(whole) == STEPS


def test_resume_with_other_options_is_refused_with_the_differences(tmp_path):
    fit(LitToy(), [SOURCED[0].callback(), SaveEveryStep(tmp_path)], max_epochs=1)
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


def test_state_of_another_version_is_refused_with_both_versions(tmp_path):
    method = SOURCED[0]
    fit(LitToy(), [method.callback(), SaveEveryStep(tmp_path)], max_epochs=1)
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    checkpoint["lightning_transfer"] |= {"format": 0, "version": "0.0.1"}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(lt.TransferConfigError, match=r"lightning_transfer 0\.0\.1 .*this is"):
        fit(LitToy(), [method.callback()], ckpt_path=tmp_path / "old.ckpt")
    with pytest.raises(lt.TransferConfigError, match=r"0\.0\.1"):
        lt.load_from_checkpoint(LitToy, tmp_path / "old.ckpt")


def test_mixin_resumes_exactly(tmp_path):
    method = SOURCED[0]
    whole = method.mixin()
    fit(whole, [SaveEveryStep(tmp_path)], loader=StatefulLoader())
    for cut in (2, 6, 9):
        module = method.mixin()
        fit(module, loader=StatefulLoader(), ckpt_path=tmp_path / f"step={cut}.ckpt")
        for name, value in whole.state_dict().items():
            assert (
                value == module.state_dict()[name]
                if "extra_state" in name
                else (value == module.state_dict()[name]).all()
            )
