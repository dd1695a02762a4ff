"""Damage what this package writes, thousands of times: an error of ours comes of it or the right answer, nothing else.

`python -m tests.mutating 4000 --seed 1` damages each kind of file and state 4,000 times and prints what came of it; the
suite does the same a few hundred times with seed 0.
"""

import argparse
import copy
import json
import random
import tempfile
from collections import Counter
from pathlib import Path

import lightning.pytorch as L
import torch

import lightning_transfer as lt
from lightning_transfer.glue.checkpoints import unhide_optimizer_states
from lightning_transfer.methods.collaborative.search.plan import Evaluation
from lightning_transfer.surgery import rebuild
from tests import toys
from tests.methods import Collaborating, GatedFeatures, GatedFilters, SoftByHand, borrowed
from tests.selective.select_run import made_selection
from tests.toys import LitToy, fit

PLAN = lt.LayerPlan(
    {"own": 0, "source1": 1},
    {"own": 1, "source1": 2},
    (Evaluation((0, 1), 0.5), Evaluation((0, 0), 0.25), Evaluation((1, 2), None, "no memory")),
    {"strategy": "swarm", "seed": "0", "weights": "0a1b2c3d"},
)
VALUES = (0, 1, -1, 2, 7, 7.0, 0.5, 1e300, True, False, None, "", "0", "own", [], {}, [0], {"a": 1}, float("nan"))


def damage_bytes(data, draw):
    """Flip, cut, insert, repeat, swap."""
    found = bytearray(data)
    place, other = draw.randrange(len(found)), draw.randrange(len(found))
    first, last = sorted((place, other))
    match draw.randrange(7):
        case 0 | 1:
            found[place] ^= 1 << draw.randrange(8)
        case 2:
            found = found[:place]
        case 3:
            found[place:place] = draw.randbytes(draw.randint(1, 4))
        case 4:
            found[first:last] = b""
        case 5:
            found[place] = draw.choice(b'0123456789{}[],:"-.eE nut')
        case 6:
            found[place], found[other] = found[other], found[place]
    return bytes(found)


def damage_data(data, draw):
    """Change one place in nested data, which is copied."""
    root = [copy.deepcopy(data)]
    inside, key = draw.choice([*places(root)])
    value = inside[key]
    match draw.randrange(6):
        case 0 | 1 if isinstance(value, torch.Tensor) and value.numel():
            flat = value.reshape(-1).clone()
            where = draw.randrange(len(flat))
            flat[where] = ~flat[where] if flat.dtype == torch.bool else flat[where] + 1
            inside[key] = flat.view(value.shape)
        case 0 | 1 if isinstance(value, int | float):
            inside[key] = value + draw.choice([1, -1, 0.5, 100])
        case 0 | 1 if isinstance(value, str):
            inside[key] = draw.choice([value + "0", value[1:], value.swapcase(), value[::-1]])
        case 2 if isinstance(inside, dict):
            del inside[key]
        case 3 if isinstance(inside, dict):
            inside[draw.choice(["0", "more", f"{key}0"])] = inside.pop(key)
        case 4:
            other, there = draw.choice([*places(root)])
            inside[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(value)
        case _:
            inside[key] = copy.deepcopy(draw.choice([*VALUES, torch.zeros(2), torch.tensor(1)]))
    return root[0]


def places(inside):
    """Every container and key in nested data, the containers first."""
    for key, value in [*inside.items()] if isinstance(inside, dict) else [*enumerate(inside)]:
        yield inside, key
        if isinstance(value, dict | list):
            yield from places(value)


def same(one, other):
    """Equal, types included; tuples and lists alike."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return both and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def count(num, draw, damage, read, right, refusals=(lt.TransferConfigError,)):
    """What comes of so many damages: refused, or right; anything else is raised."""
    found = Counter()
    for number in range(num):
        damaged = damage(draw)
        try:
            answer = read(damaged)
        except refusals:
            found["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"damage {number} ends in {error!r}: {str(damaged)[:2000]}") from error
        assert same(answer, right), f"damage {number} gives another answer: {str(damaged)[:2000]}"
        found["right"] += 1
    return found


def as_plain(selection):
    tensors = {name: getattr(selection, name) for name in type(selection).__dataclass_fields__}
    return {**tensors, "target": None, "source": None}


def plan_file(num, draw, folder):
    PLAN.save(folder / "plan.json")
    data = (folder / "plan.json").read_bytes()

    def damage(draw):
        if draw.random() < 0.5:
            return damage_bytes(data, draw)
        changed = damage_data(json.loads(data), draw)
        return json.dumps(changed, default=lambda tensor: tensor.tolist()).encode()

    def read(damaged):
        (folder / "damaged.json").write_bytes(damaged)
        return vars(lt.LayerPlan.load(folder / "damaged.json"))

    return count(num, draw, damage, read, vars(PLAN))


def selection_file(num, draw, folder):
    made = made_selection()
    made.save(folder / "chosen")
    data = (folder / "chosen").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")

    def damage(draw):
        if draw.random() < 0.5:
            return damage_bytes(data, draw)
        header = damage_data(json.loads(data[8:end]), draw)
        text = json.dumps(header, default=lambda tensor: tensor.tolist()).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    def read(damaged):
        (folder / "damaged").write_bytes(damaged)
        return as_plain(lt.Selection.load(folder / "damaged"))

    return count(num, draw, damage, read, as_plain(made))


MIXINS = {
    "adafilter": lambda: GatedFilters(gated="model.conv", gate_width=4),
    "gated": lambda: GatedFeatures(ratio=2, aux_weight=0.0),
    "collaborative": lambda: Collaborating(frozen_layers={"source1": 1}),
}


class UnknownKeysError(Exception):
    """What torch says to a state_dict that does not fit, where nothing of a spec is left to know it by."""


def spec(method):
    """Of a changed network, in its state_dict, read by a module that is plain or changed."""

    def mutate(num, draw, folder):
        state = MIXINS[method]().state_dict()
        (key,) = [key for key in state if key.endswith("_extra_state") and state[key].dtype == torch.int64]
        text = bytes(state[key].tolist())

        def damage(draw):
            if draw.random() < 0.5:
                changed = torch.tensor([*damage_bytes(text, draw)], dtype=torch.int64)
                if len(changed) and draw.random() < 0.1:
                    changed[draw.randrange(len(changed))] += draw.choice([256, -256, 2**40])
            else:
                data = damage_data(json.loads(text), draw)
                text_then = json.dumps(data, default=lambda tensor: tensor.tolist())
                changed = torch.tensor([*text_then.encode()], dtype=torch.int64)
            return {**state, key: changed}

        def read(damaged):
            module = LitToy() if method != "collaborative" and draw.random() < 0.5 else MIXINS[method]()
            try:
                rebuild(module, damaged)
                module.load_state_dict(damaged)
            except RuntimeError as error:
                raise UnknownKeysError(error) if "Error(s) in loading state_dict" in str(error) else error from error
            return {name: module.state_dict()[name] for name in state}

        return count(num, draw, damage, read, state, (lt.TransferConfigError, UnknownKeysError))

    return mutate


def source():
    return lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4)


CALLBACKS = {
    "soft": lambda: lt.SoftFinetuning(source(), weight=lt.Schedule(until_steps=4)),
    "selective": lambda: lt.SelectiveJointFinetuning(
        source(), neighbors=borrowed(), target=toys.target_data(), weight=lt.Schedule(1.0, 1.0)
    ),
    "auxiliary": lambda: lt.GatedTransfer(ratio=2, tap="model.bn"),
    "plan": lambda: lt.CollaborativeFinetuning([toys.OtherNet()], frozen_layers=PLAN),
}


def callback_state(name):
    """Of a callback in the middle of a run."""

    def mutate(num, draw, folder):
        found = Counter()
        callback = CALLBACKS[name]()

        class Damaging(L.Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                if trainer.global_step == 3:
                    state = as_lists(copy.deepcopy(callback.state_dict()))

                    def read(damaged):
                        callback.load_state_dict(damaged)
                        return callback.state_dict()

                    found.update(count(num, draw, lambda draw: damage_data(state, draw), read, state))

        fit(LitToy(), [callback, Damaging()], max_steps=4)
        return found

    return mutate


def as_lists(value):
    """Lists for tuples, which can be changed in place."""
    if isinstance(value, dict):
        return {key: as_lists(item) for key, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def mixin_state(num, draw, folder):
    term = SoftByHand(source(), weight=lt.Schedule(until_steps=4)).source_task
    state = as_lists(term.get_extra_state())

    def read(damaged):
        term.set_extra_state(damaged)
        return {**term.get_extra_state(), "options": term._saved_options}

    return count(num, draw, lambda draw: damage_data(state, draw), read, state)


def optimizer_state(num, draw, folder):
    """What is hidden of optimizers under this package's key."""
    fit(LitToy(), [CALLBACKS["soft"](), toys.SaveEveryStep(folder)], max_steps=4)
    checkpoint = torch.load(folder / "step=2.ckpt", weights_only=True)
    hidden = checkpoint.pop("lightning_transfer")

    def read(damaged):
        whole = copy.deepcopy(checkpoint) | {"lightning_transfer": damaged}
        unhide_optimizer_states(["SoftFinetuning"], whole)
        return whole["optimizer_states"]

    right = read(hidden)
    return count(num, draw, lambda draw: damage_data(hidden, draw), read, right)


KINDS = {
    "plan file": plan_file,
    "selection file": selection_file,
    **{f"spec of {method}": spec(method) for method in MIXINS},
    **{f"state of {name}": callback_state(name) for name in CALLBACKS},
    "state of a mixin": mixin_state,
    "hidden optimizer state": optimizer_state,
}


def mutations(kind, num, seed):
    """Damage one kind so often."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        return KINDS[kind](num, random.Random(f"{seed} {kind}"), Path(folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num", type=int, help="damages of each kind")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    total = Counter()
    for kind in KINDS:
        found = mutations(kind, given.num, given.seed)
        total += found
        print(f"{kind:24} {found['refused']:6,} refused {found['right']:6,} right")
    print(f"{'together':24} {total['refused']:6,} refused {total['right']:6,} right, of {total.total():,}")


if __name__ == "__main__":
    main()
