"""Typed sections of a configuration: their values, defaults and checks."""

import pytest
from omegaconf import OmegaConf

from continual.errors import Problems
from continual.runs.settings import CheckpointSettings, read_section, read_settings


def problems_of(config):
    problems = Problems()
    read_settings(OmegaConf.create(config), problems)
    return problems.messages


def test_a_section_has_the_values_given_and_defaults_for_the_rest():
    config = OmegaConf.create({"checkpoint": {"every_steps": 5}, "other": {"key": 1}})
    section = read_section(config, "checkpoint", CheckpointSettings)
    assert section == CheckpointSettings(every_steps=5, every_seconds=None, keep=None)


def test_a_command_without_sections_has_the_defaults():
    problems = Problems()
    settings = read_settings(OmegaConf.create({"seed": 0}), problems)
    assert not problems
    assert settings.adapt is None
    assert settings.score.batch_size == 128


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data": {"max_length": None}}, "data.max_length=None: expected a whole number of at le"),
        ({"data": {"max_length": True}}, "data.max_length=True: expected a whole number of at le"),
        ({"score": {"judge": {"batch_size": 0}}}, "score.judge.batch_size=0: expected a whole nu"),
        ({"adapt": {"shots": [0]}}, "adapt.shots=[0]: expected a list of whole numbers of at lea"),
        ({"adapt": {"eval_steps": 5}}, "adapt.eval_steps=5: expected a list of whole numbers of"),
        ({"seed": 2**63}, f"seed={2**63}: expected a whole number below 2^63"),
    ],
)
def test_a_value_that_cannot_work_is_a_problem(config, message):
    (problem,) = problems_of(config)
    assert problem.startswith(message)


def test_all_problems_are_reported_together():
    assert len(problems_of({"seed": -1, "checkpoint": {"keep": 0, "every_seconds": -2}})) == 3


def test_null_is_no_limit_where_the_key_allows_it():
    assert not problems_of({"score": {"max_examples": None}, "checkpoint": {"keep": None}})
