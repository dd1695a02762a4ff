"""Options as configuration tools hand them over: omegaconf's mappings and lists are not dict and list."""

import functools
import inspect
import re
import types

import lightning.pytorch as L
import pytest
import timm
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf
from torch import nn

import lightning_transfer as lt
from examples.your_own_method.l2_sp import L2SP
from lightning_transfer.glue.namespaces import AnyCallback
from tests import toys
from tests.toys import LitToy, assert_same, fit, weights

conf = OmegaConf.create
CALLBACKS = [getattr(lt, name) for name in lt.callbacks.__all__]


def source(**options):
    return lt.SourceTask(toys.source_data(), head=toys.source_head(), batch_size=4, **options)


@pytest.mark.parametrize("make", [lt.SoftFinetuning, lt.SelectiveJointFinetuning])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (conf({"start": 0.5, "shape": "cosine"}), lt.Schedule(0.5, shape="cosine")),
        ({"start": 0.5, "until_steps": 7}, lt.Schedule(0.5, until_steps=7)),
        (0.25, lt.Schedule(0.25, 0.25)),
        (1, lt.Schedule(1, 1)),
        (0, lt.Schedule(0, 0)),
        ("auto", "auto"),
    ],
)
def test_a_weight_is_a_schedule_a_number_or_a_mapping_alike_everywhere(make, given, meant):
    few = {} if make is lt.SoftFinetuning else {"neighbors": 4}
    assert make(source(), weight=given, **few).weight == meant


class ByHand(lt.SourceTaskMixin, LitToy):
    def __init__(self, task=None, **options):
        super().__init__()
        self.add_source_task(task or source(), **options)


@pytest.mark.parametrize("given", [conf({"start": 0.5, "end": 0.5}), 0.5])
def test_a_mixins_weight_too(given):
    assert ByHand(weight=given).source_task.annealing.schedule == lt.Schedule(0.5, 0.5)


def test_a_run_with_mappings_is_the_run_with_objects():
    ends = []
    for weight in (conf({"start": 0.5, "until_steps": 3}), lt.Schedule(0.5, until_steps=3)):
        module = LitToy()
        fit(module, [lt.SoftFinetuning(source(), weight=weight)], max_epochs=1)
        ends.append(weights(module))
    assert_same(*ends)


def test_neighbors_a_source_and_a_search_are_taken_as_mappings():
    given = {"dataset": toys.source_data(), "num_classes": 7}  # omegaconf holds no datasets
    callback = lt.SelectiveJointFinetuning(given, neighbors=conf({"k": 5, "rounds": 0}), protect=())
    assert callback.neighbors == lt.Neighbors(k=5, rounds=0)
    assert callback.source.num_classes == 7
    assert lt.SoftFinetuning(given).source.num_images == 20
    several = lt.CollaborativeFinetuning([toys.OtherNet()], search=conf({"particles": 2, "iterations": 1}))
    assert several.search == lt.LayerSearch(particles=2, iterations=1)


@pytest.mark.parametrize("mapping", [dict, lambda given: OmegaConf.create(given, flags={"allow_objects": True})])
@pytest.mark.parametrize(
    "built",
    [
        lambda given: lt.SoftFinetuning(given).source,
        lambda given: lt.SelectiveJointFinetuning(given, neighbors=4).source,
        lambda given: ByHand(given).source_task.source,
    ],
    ids=["soft", "selective", "mixin"],
)
def test_a_mapping_with_from_timm_makes_what_from_timm_makes(built, mapping, monkeypatch):
    network = types.SimpleNamespace(get_classifier=toys.source_head)
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append((name, options)) or network)
    data = toys.source_data()
    meant = lt.SourceTask.from_timm("resnet10t", data, batch_size=3, forward="joint", seed=5)
    found = built(mapping({"from_timm": "resnet10t", "dataset": data, "batch_size": 3, "forward": "joint", "seed": 5}))
    assert asked == [("resnet10t", {"pretrained": True})] * 2
    assert found.describe() == meant.describe()
    assert found.dataset is data
    assert_same(weights(found.head), weights(toys.source_head()))


def test_lists_and_mappings_of_omegaconfs_go_where_lists_and_mappings_go():
    gated = LitToy()
    report = lt.functional.apply_adafilter(gated, gated=conf(["model.con*"]), gate_width=4)
    assert report.replaced == ("model.conv",)
    assert lt.AdaFilter(gated=conf(["model.con*"])).options["gated"] == ["model.con*"]
    module = LitToy()
    fit(module, [lt.AdaFilter(gated=conf(["model.con*"]), gate_width=4)], max_epochs=1)
    frozen = lt.CollaborativeFinetuning([toys.OtherNet()], frozen_layers=conf({"source1": 1}))
    fit(LitToy(), [frozen], max_epochs=1)
    bank = lt.FilterBank.from_model(nn.Sequential(nn.Conv2d(3, 4, 3)), layers=conf(["0"]), normalize=False)
    assert bank.num_filters == (4,)
    names = conf({"one": "resnet10t"})
    assert "one" in repr(lt.CollaborativeFinetuning(names))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: lt.SoftFinetuning(source(), weight=conf({"strat": 1.0})),
            "weight has no option 'strat'. Did you mean 'start'",
        ),
        (lambda: lt.SoftFinetuning({"num_classes": 3}), "source=.* is not a SourceTask: .*'dataset'"),
        (lambda: lt.SoftFinetuning({"data": 3}), "source has no option 'data'.*'dataset'"),
        (lambda: lt.SoftFinetuning({"from_tim": "x"}), "source has no option 'from_tim'. Did you mean 'from_timm'"),
        (
            lambda: lt.SoftFinetuning({"from_timm": "x", "batchsize": 3}),
            "no option 'batchsize'. Did you mean 'batch_size'",
        ),
        (lambda: lt.SoftFinetuning({"from_timm": "x"}), "is not a SourceTask: .*'dataset'"),
        (
            lambda: lt.SoftFinetuning({"from_timm": "x", "dataset": toys.source_data(), "head": toys.source_head()}),
            "source has head and from_timm",
        ),
        (lambda: lt.SoftFinetuning(source(), weight=[1.0]), "is not a weight; write lt.Schedule"),
        (lambda: lt.SoftFinetuning(source(), weight=-1.0), "weight=-1.0; it takes a finite number from 0"),
        (lambda: lt.SelectiveJointFinetuning(source(), neighbors=conf({"kk": 3})), "neighbors has no option 'kk'.*'k'"),
        (lambda: lt.CollaborativeFinetuning([], search=conf({"particle": 3})), "Did you mean 'particles'"),
        (lambda: lt.SelectiveJointFinetuning(source(), neighbors=4, protect=3), "protect takes a list of datasets"),
    ],
)
def test_what_a_mapping_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(lt.TransferConfigError, match=message):
        make()


@pytest.mark.filterwarnings("ignore")  # jsonargparse's own
@pytest.mark.parametrize("written", ["0.5", "{start: 0.5, end: 0.5}"])
def test_a_weight_in_a_lightning_cli_file(written, tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(lt.SoftFinetuning, "callback")
    (tmp_path / "file.yaml").write_text(
        "class_path: lightning_transfer.SoftFinetuning\n"
        "init_args:\n"
        "  source: {dataset: {class_path: tests.methods.SourceData}, num_classes: 7}\n"
        f"  weight: {written}\n"
    )
    config = parser.parse_args([f"--callback={tmp_path / 'file.yaml'}"])
    assert parser.instantiate_classes(config).callback.weight == lt.Schedule(0.5, 0.5)
    again = parser.parse_string(parser.dump(config))
    assert parser.instantiate_classes(again).callback.weight == lt.Schedule(0.5, 0.5)


@pytest.mark.parametrize(
    ("add", "callback", "own"),
    [
        (lt.SourceTaskMixin.add_source_task, lt.SoftFinetuning, {"borrow"}),
        (lt.AdaFilterMixin.add_adafilter, lt.AdaFilter, set()),
        (lt.GatedTransferMixin.add_gated_transfer, lt.GatedTransfer, set()),
        (lt.CollaborativeMixin.add_sources, lt.CollaborativeFinetuning, set()),
    ],
)
def test_a_mixin_shows_and_takes_the_options_of_its_callback(add, callback, own):
    this, *mine = inspect.signature(add).parameters.values()
    theirs = [option for option in inspect.signature(callback).parameters.values() if option.name != "search"]
    assert this.name == "self"
    assert [(option.name, option.kind, option.default) for option in mine if option.name not in own] == [
        (option.name, option.kind, option.default) for option in theirs
    ]
    with pytest.raises((TypeError, lt.TransferConfigError), match="(argument|option) 'misspelt'"):
        add(LitToy(), *[None for option in mine if option.default is option.empty], misspelt=1)


@pytest.mark.parametrize("name", lt.callbacks.__all__)
def test_a_configuration_file_sees_and_checks_every_option(name, capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=L.Callback)
    path = f"lightning_transfer.{name}"
    with pytest.raises(SystemExit):
        parser.parse_args([f"--callback.help={path}"])
    shown = " ".join(capsys.readouterr().out.split())
    for option in inspect.signature(getattr(lt, name)).parameters.values():
        assert re.search(rf"--callback\.{option.name} \S+.*?\w\w\w", shown), option.name
        if isinstance(option.default, str | float | int):
            assert f"default: {option.default})" in shown
    given = {"class_path": path, "init_args": {"misspelt": 1}}
    with pytest.raises(ArgumentError, match=rf"{path}':\s+Option 'misspelt' is not accepted"):  # as the guide says
        parser.parse_object({"callback": given})


@pytest.mark.parametrize("by_hydra", [False, True])
@pytest.mark.parametrize("callback", [*CALLBACKS, L2SP])
def test_a_misspelt_option_of_a_callback_is_refused_with_the_nearest(callback, by_hydra):
    right = [*inspect.signature(callback).parameters][-1]
    wrong = {right[:-1]: None}
    said = re.escape(f"{callback.__name__} has no option '{right[:-1]}'. Did you mean '{right}'? Known: ")
    if by_hydra:
        with pytest.raises(InstantiationException, match=said):
            instantiate({"_target_": f"{callback.__module__}.{callback.__name__}", **wrong})
    else:
        with pytest.raises(lt.TransferConfigError, match=said):
            callback(**wrong)
    parameters = [*inspect.signature(callback.__init__).parameters.values()][1:]
    assert [*inspect.signature(callback).parameters.values()] == parameters


def test_a_callback_without_options_has_none_to_misspell():
    class Mine(AnyCallback):
        def __init__(self):
            self.losses = []

    with pytest.raises(lt.TransferConfigError, match="Mine has no option 'momentum'. Known: none."):
        Mine(momentum=0.0)


def test_of_subclasses_only_names_that_their_own_constructor_takes_are_refused():
    class Mine(L2SP):
        def __init__(self, mine=1, **options):
            super().__init__(**options)
            self.mine = mine

    class Wrapped(L2SP):
        @functools.wraps(L2SP.__init__)
        def __init__(self, *args, name, **options):
            super().__init__(*args, **options)
            self.name = name

    class Plain(AnyCallback):
        pass

    assert Wrapped(name="own").name == "own"
    assert (Mine(2, weight=0.5).mine, Mine(weight=0.5).weight) == (2, 0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'weigth'"):
        Mine(weigth=0.5)
    Plain()
    for args, options in (((1,), {}), ((), {"mine": 1})):
        with pytest.raises(TypeError, match="takes"):
            Plain(*args, **options)
