"""The config groups, how shared parts reach the stages, and every message about bad input."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict

from metaopt.app.config import prepare, with_facts
from metaopt.base.errors import ConfigError

CONF = Path(__file__).parent.parent.parent / "conf"
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
PARTS = [path for path in FILES if path.parts[0] == "_parts"]  # pieces of other files, no options
GROUP_FILES = [path for path in FILES if len(path.parts) == 2 and path not in PARTS]

FACTS = {
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_length": 32,
    "max_target_length": 12,
    "num_features": 64,
    "num_labels": 10,
    "num_examples": 100,
    "num_sources": 8,
}


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_module("metaopt.conf", version_base="1.3"):
        yield


def prepared(*overrides: str) -> DictConfig:
    return composed("config", overrides, overrides)


def composed(name: str, overrides: Sequence[str], written: Sequence[str]) -> DictConfig:
    config = compose(name, overrides=list(overrides), return_hydra_config=True)
    choices = config.hydra.runtime.choices
    with open_dict(config):
        del config["hydra"]
    return prepare(config, written, choices)


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        prepared(*overrides)
    return str(caught.value)


def learning_rates(config: DictConfig) -> dict[str, Any]:
    return {name: stage.optimizer.lr for name, stage in config.stages.items()}


# --- every file -------------------------------------------------------------------------------------------------


def test_the_number_of_config_files() -> None:
    groups = Counter(path.parts[0] for path in GROUP_FILES)
    assert groups == {
        "data": 4,
        "debug": 1,
        "estimator": 7,
        "experiment": 6,
        "final": 3,
        "handover": 8,
        "hparams_search": 3,
        "logger": 4,
        "loss": 6,
        "meta_optimizer": 4,
        "meta_params": 13,
        "model": 12,
        "objective": 6,
        "optimizer": 15,
        "product": 3,
        "schedule": 6,
        "stage": 3,
        "transform": 3,
    }
    assert len(FILES) == sum(groups.values()) + len(PARTS) + 6  # config, check, fidelity, the three help texts


WHERE = {
    "stage": "stage@stages.student",
    "schedule": "schedule@stages.student.schedule",
    "transform": "transform@stages.student.transform",
    "product": "estimator=checkpointed product",
}
UNSET = ("custom", "pretrained_bert2bert", "from_config", "pretrained", "text")
# Groups that know nothing of each other: an option of each at a time.
APART = ("optimizer", "meta_optimizer", "schedule", "transform", "logger", "product", "model", "meta_params")


def options() -> list[str]:
    """Every option once: those of the groups apart in rows, any other by itself."""
    every = [(*path.parts[:-1], path.stem) for path in GROUP_FILES]
    named = [(group, option, f"{WHERE.get(group, group)}={option}") for group, option in every]
    columns = [[text for g, option, text in named if g == group and option not in UNSET] for group in APART]
    rows = [" ".join(filter(None, row)) for row in itertools.zip_longest(*columns)]
    alone = [text for group, option, text in named if group not in APART or option in UNSET]
    assert len(" ".join([*rows, *alone]).replace("estimator=checkpointed product", "").split()) == len(GROUP_FILES)
    return [*rows, *alone]


@pytest.mark.slow
@pytest.mark.parametrize("row", options())
def test_every_option_composes(row: str) -> None:
    if "digits_optuna" in row:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra optuna is not installed")
    if row.split("=")[-1] in UNSET:
        assert "is not set" in problems(row)
    else:
        with_facts(prepared(*row.split()), FACTS)


def test_every_file_says_what_it_is() -> None:
    for path in FILES:
        text = (CONF / path).read_text()
        assert text.endswith("\n"), path
        assert text.startswith("#") or "_target_" in text or "help" in path.parts, path


OPTION = re.compile(r"( *)(?:- )?([A-Za-z]\w*):( .*)?")


def unexplained(text: str) -> Iterator[str]:
    """Lines that set an option and have no comment, nor stand in a block that has one."""
    explained: int | None = None
    for line in re.sub(r"^(defaults|hydra):\n(  .*\n)+", "", text, flags=re.MULTILINE).splitlines():
        found = OPTION.fullmatch(line)
        if found is None or (explained is not None and len(found[1]) > explained):
            continue
        explained = len(found[1]) if "  # " in line else None
        if explained is None and found[3]:
            yield line


def test_every_option_says_what_it_does() -> None:
    assert list(unexplained("a: 1\nb: 2  # two\nc:  # three\n  d: 4\ne:\n  f: 5\n")) == ["a: 1", "  f: 5"]
    for path in FILES:
        if path.parts[0] not in ("hydra", "experiment", "debug"):
            assert not list(unexplained((CONF / path).read_text())), path


# --- shared parts -----------------------------------------------------------------------------------------------


def test_an_option_for_every_stage() -> None:
    config = prepared("optimizer=sgd")
    assert {stage.optimizer._target_ for stage in config.stages.values()} == {"torch.optim.SGD"}


def test_a_schedule_and_a_transform_for_every_stage_or_for_one() -> None:
    assert {(stage.schedule, stage.transform) for stage in prepared().stages.values()} == {(None, None)}
    config = prepared("schedule=cosine", "transform=clip_norm", "stages.student.schedule.T_max=7")
    assert {name: stage.schedule.T_max for name, stage in config.stages.items()} == {"teacher": 100, "student": 7}
    assert {stage.transform._target_ for stage in config.stages.values()} == {"metaopt.ClipNorm"}
    config = prepared("schedule=cosine", "stages.teacher.schedule=null")
    assert [stage.schedule is None for stage in config.stages.values()] == [True, False]


def test_an_option_for_one_stage() -> None:
    config = prepared("optimizer@stages.student.optimizer=sgd")
    assert config.stages.teacher.optimizer._target_ == "torch.optim.Adam"
    assert config.stages.student.optimizer == {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.05}


def test_a_value_for_one_stage() -> None:
    rates = learning_rates(prepared("stages.student.optimizer.lr=1e-4", "optimizer.lr=1"))
    assert rates == {"teacher": 1, "student": 1e-4}


def test_a_value_for_every_stage() -> None:
    assert learning_rates(prepared("optimizer.lr=0.5")) == {"teacher": 0.5, "student": 0.5}
    config = prepared("model.hidden_size=16", "handover=soft_labels", "handover.loss.temperature=3")
    assert [stage.model.hidden_size for stage in config.stages.values()] == [16, 16]
    assert config.stages.student.loss.temperature == 3


def test_a_stage_s_own_value_wins_even_if_it_is_the_shipped_one() -> None:
    shipped = prepared().optimizer.lr
    rates = learning_rates(prepared(f"stages.student.optimizer.lr={shipped}", "optimizer.lr=1"))
    assert rates == {"teacher": 1, "student": shipped}


def test_a_stage_s_own_target_takes_no_argument_of_another() -> None:
    config = prepared("stages.student.optimizer._target_=torch.optim.SGD")
    assert config.stages.student.optimizer == {"_target_": "torch.optim.SGD"}


def test_the_hand_over_gives_data_and_loss() -> None:
    stages = prepared("handover=decoded").stages
    assert stages.student.generate._target_ == "metaopt.Decoded"
    assert stages.teacher.generate is None
    stages = prepared("handover=soft_labels").stages
    assert stages.student.generate is None
    assert stages.student.loss._target_ == "metaopt.Distillation"
    assert stages.teacher.loss._target_ == "metaopt.WeightedLoss"


def test_a_shared_value_that_reaches_no_stage_is_refused_with_the_right_spelling() -> None:
    own = ("optimizer@stages.teacher.optimizer=adamw", "optimizer@stages.student.optimizer=sgd")
    message = problems(*own, "optimizer.lr=1")
    assert "optimizer.lr reaches no stage" in message
    assert "stages.teacher.optimizer.lr=... or stages.student.optimizer.lr=..." in message
    assert "optimizer@stages.teacher.optimizer=..." in problems(*own, "optimizer=sgd")
    one = ("stage@stages.student=supervised", "handover.loss.temperature=2")
    assert "stages.student.loss.temperature=..." in problems(*one)
    prepared(*own)


def test_the_same_in_an_experiment_of_the_user(tmp_path: Path) -> None:
    write(
        tmp_path / "experiment/mine.yaml",
        "# @package _global_",
        "defaults: [_self_, override /optimizer@stages.teacher.optimizer: sgd, "
        "override /optimizer@stages.student.optimizer: adamw]",
        "optimizer: {lr: 7}",
    )
    with pytest.raises(ConfigError, match=r"optimizer\.lr reaches no stage"):
        from_user(tmp_path, "experiment=mine")
    write(tmp_path / "experiment/mine.yaml", "# @package _global_", "optimizer: {lr: 7}")
    assert learning_rates(from_user(tmp_path, "experiment=mine")) == {"teacher": 7, "student": 7}
    assert learning_rates(from_user(tmp_path, "experiment=mine", "optimizer.lr=8")) == {"teacher": 8, "student": 8}


# --- a user's own folder ----------------------------------------------------------------------------------------


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, ""]))


def from_user(folder: Path, *overrides: str, name: str = "config") -> DictConfig:
    """Compose as `metaopt --config-dir FOLDER` does."""
    search = f"hydra.searchpath=[file://{folder}]"
    return composed(name, [*overrides, search], overrides)


def test_a_stage_in_the_middle(tmp_path: Path) -> None:
    write(
        tmp_path / "experiment/three.yaml",
        "# @package _global_",
        "defaults:",
        "  - /stage@stages.assistant: distilled",
        "  - _self_",
        "  - override /handover: soft_labels",
        "chain: [teacher, assistant, student]",
        "stages:",
        "  assistant: {num_steps: 3, optimizer: {lr: 0.125}}",
    )
    config = from_user(tmp_path, "experiment=three", "model.hidden_size=16", "stages.assistant.optimizer.eps=1e-5")
    assert list(config.chain) == ["teacher", "assistant", "student"]
    assert config.stages.assistant.num_steps == 3
    assert config.stages.assistant.optimizer.lr == 0.125
    assert config.stages.assistant.optimizer.eps == 1e-5
    assert config.stages.assistant.loss == config.stages.student.loss
    assert config.stages.assistant.model.hidden_size == 16
    one = from_user(tmp_path, "experiment=three", "optimizer@stages.assistant.optimizer=sgd")
    assert one.stages.assistant.optimizer._target_ == "torch.optim.SGD"


def test_a_stage_that_the_chain_forgets(tmp_path: Path) -> None:
    assert "stages.assistant is not in chain" in problems("+stage@stages.assistant=distilled")
    prepared("+stage@stages.assistant=distilled", "chain=[teacher,assistant,student]")


def test_a_chain_of_one_stage() -> None:
    config = prepared("~stage@stages.student", "chain=[teacher]", "objective.stage=teacher")
    assert list(config.stages) == ["teacher"]


def test_a_primary_config_of_the_user_builds_on_ours(tmp_path: Path) -> None:
    write(
        tmp_path / "mine.yaml",
        "defaults: [config, _self_]",
        "hydra: {searchpath: ['pkg://metaopt.conf']}",
        "optimizer: {lr: 0.5}",
        "trainer: {meta_steps: 3}",
    )
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        overrides = ["optimizer@stages.student.optimizer=sgd"]
        config = prepare(compose("mine", overrides=overrides), overrides)
    assert config.trainer.meta_steps == 3
    assert learning_rates(config) == {"teacher": 0.5, "student": 0.05}


def test_several_meta_parameters(tmp_path: Path) -> None:
    write(
        tmp_path / "meta_params/two.yaml",
        "sources: {_target_: metaopt.SourceWeights, num_sources: '${facts.num_sources}'}",
        "examples: {_target_: metaopt.ExampleWeights, num_examples: '${facts.num_examples}', sise: 3}",
    )
    with pytest.raises(ConfigError, match=r"meta_params\.examples\.sise: .* takes no such argument"):
        from_user(tmp_path, "meta_params=two")


# --- bad input --------------------------------------------------------------------------------------------------

BAD = [
    (["stages.student.num_steps=0"], "stages.student.num_steps = 0: must be at least 1"),
    (["stages.student.num_steps=2.5"], "stages.student.num_steps = 2.5: must be a whole number"),
    (["stages.student.num_steps=true"], "must be a whole number"),
    (["trainer.meta_steps=-1"], "trainer.meta_steps = -1: must be at least 0"),
    (["trainer.meta_steps=many"], "trainer.meta_steps = 'many': must be a whole number"),
    (["trainer.dtype=float23"], "(did you mean 'float32'?)"),
    (["trainer.select_every=0"], "must be at least 1"),
    (["trainer.select_every=null", "trainer.patience=2"], "trainer.patience needs trainer.select_every"),
    (["output.plots=perhaps"], "output.plots = 'perhaps': must be true or false"),
    (["final.compare=[lerned]"], "final.compare.0 = 'lerned': must be 'learned' or 'uniform' (did you mean"),
    (["stages.teacher.carry=sometimes"], "must be 'always' or 'never' or a whole number"),
    (["stages.teacher.carry=0"], "stages.teacher.carry = 0: must be 'always' or 'never' or at least 1"),
    (["stages.teacher.carry=never", "stages.teacher.warmup_steps=5"], "stages.teacher.warmup_steps would be lost"),
    (["stages.teacher.data=unlabeled"], "(did you mean 'unlabelled'?)"),
    (["stages.teacher.data=test"], "must be 'train', 'unlabelled' or 'validation'"),
    (["+trainer.meta_step=3"], "trainer.meta_step: there is no such option (did you mean 'meta_steps'?)"),
    (["+optimiser.lr=3"], "optimiser: there is no such option (did you mean 'optimizer'?)"),
    (["+stages.student.num_step=3"], "(did you mean 'num_steps'?)"),
    (["+optimizer.weight_decey=0"], "torch.optim.Adam takes no such argument (did you mean 'weight_decay'?)"),
    (["stages.student.optimizer.weight_decey=0"], "stages.student.optimizer.weight_decey: torch.optim.Adam"),
    (["optimizer.lr=fast"], "optimizer.lr = 'fast': torch.optim.Adam takes a number"),
    (["model=mlp", "model.hidden_sizes=[64,x]"], "model.hidden_sizes.1 = 'x': metaopt.MLP takes a whole number"),
    (["loss=terms", "loss.terms=5"], "loss.terms = 5: metaopt.SumOfLosses takes a mapping"),
    (["loss=terms", "+loss.terms.labels.x=5"], "loss.terms.labels.x: metaopt.CrossEntropy takes no such argument"),
    (["check.steps=[1e-3, x]"], "check.steps.1 = 'x': must be a number"),
    (["output=null"], "output = None: must be a mapping"),
    (["meta_optimizer.lr=fast"], "meta_optimizer.lr = 'fast': torch.optim.Adam takes a number"),
    (["chain=[teacher,studnt]"], "stages has no such stage (did you mean 'student'?)"),
    (["chain=[]"], "at least one stage is needed"),
    (["objective=custom"], "objective._target_ is not set"),
    (["objective=custom", "objective._target_=nowhere.Mine"], "No module named 'nowhere'"),
    (["objective=custom", "objective._target_=metaopt.ValidationLos"], "(did you mean 'ValidationLoss'?)"),
    (["objective=custom", "objective._target_=metaopt.ValidationLoss"], "needs it; add +objective.stage=..."),
    (["objective._target_=metaopt.WeightedLoss"], "objective.stage: metaopt.WeightedLoss takes no such argument"),
    (["objective=custom", "objective._target_=metaopt.__version__"], "a str cannot be called"),
    (["objective=custom", "objective._target_=not a path"], "a dotted path such as my_module.MyClass is needed"),
    (["optimizer=custom"], "optimizer._target_ is not set"),
    (["stages.student.model=null"], "stages.student.model = None: must be a mapping"),
    (["trainer.device=${trainer.devise}"], "trainer.device = ${trainer.devise}: Interpolation key"),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("overrides", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_message(overrides: Sequence[str], message: str) -> None:
    found = problems(*overrides)
    assert message in found
    assert found.startswith("the config cannot be used: "), "one mistake is one message"


def test_all_problems_at_once() -> None:
    found = problems("stages.student.num_steps=0", "trainer.meta_steps=many", "+optimizer.x=1", "final.compare=[a]")
    assert found.startswith("the config has 4 problems:")
    assert found.count("\n  - ") == 4


def test_limits_cap_the_steps() -> None:
    config = prepared("debug=tiny", "stages.teacher.warmup_steps=50", "final.num_steps=500")
    assert {stage.num_steps for stage in config.stages.values()} == {config.limits.num_steps}
    assert config.stages.teacher.warmup_steps == config.final.num_steps == config.limits.num_steps


# --- facts of the data ------------------------------------------------------------------------------------------


def test_facts_fill_the_config() -> None:
    config = with_facts(prepared(), FACTS)
    assert config.meta_params.num_sources == 8
    assert OmegaConf.to_container(config.stages.student.generate, resolve=True) == {
        "_target_": "metaopt.Decoded",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_length": 12,
    }


def test_missing_facts_are_named() -> None:
    few = {name: FACTS[name] for name in ("num_features", "num_labels", "num_examples")}
    with pytest.raises(ConfigError) as caught:
        with_facts(prepared("handover=soft_labels"), {**few, "num_sources": None})
    assert "meta_params.num_sources asks for facts.num_sources" in str(caught.value)
    assert "gives only: num_features, num_labels, num_examples" in str(caught.value)


def test_data_without_facts() -> None:
    with pytest.raises(ConfigError, match=r"meta_params.num_sources asks for facts.num_sources(.|\n)*gives only: none"):
        with_facts(prepared(), {})


def test_facts_of_a_wrong_type_are_found() -> None:
    with pytest.raises(ConfigError, match=r"meta_params\.num_sources = 'eight': .* takes a whole number"):
        with_facts(prepared(), {**FACTS, "num_sources": "eight"})


# --- estimators and their products ------------------------------------------------------------------------------


def test_a_product_reaches_the_estimator_of_every_stage() -> None:
    stages = prepared("estimator=checkpointed", "product=captured").stages
    assert [s.estimator.product._target_ for s in stages.values()] == ["metaopt.Captured"] * 2


def test_a_stage_may_have_an_estimator_and_a_product_of_its_own() -> None:
    stages = prepared(
        "estimator@stages.student.estimator=truncated",
        "stages.student.estimator.last=3",
        "product@stages.student.estimator.product=finite_difference",
    ).stages
    assert stages.teacher.estimator._target_ == "metaopt.Unrolled"
    assert stages.student.estimator.last == 3
    assert stages.student.estimator.product._target_ == "metaopt.FiniteDifference"


@pytest.mark.parametrize("overrides", [["product=captured"], ["product=captured", "estimator=unrolled"]])
def test_a_product_that_no_estimator_takes_is_refused(overrides: list[str]) -> None:
    assert "no stage's estimator has one; write estimator=checkpointed" in problems(*overrides)


def test_a_value_of_the_shared_product_counts_as_a_change() -> None:
    assert "no stage's estimator has one" in problems("+product.epsilon=1e-3")
