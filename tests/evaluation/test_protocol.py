"""Protocols are immutable and can be written as JSON."""

import dataclasses
import json

import pytest

from jaxvp.evaluation.suites.tabletop import TabletopSuite


def test_protocol_is_json():
    protocol = TabletopSuite("tabletop").protocol
    values = json.loads(json.dumps(protocol.to_dict()))
    assert values["tasks"] == list(protocol.tasks) and values["camera_size"] == [64, 64]
    assert set(values) == {field.name for field in dataclasses.fields(protocol)}


def test_protocol_does_not_change():
    protocol = TabletopSuite("tabletop").protocol
    with pytest.raises(dataclasses.FrozenInstanceError):
        protocol.trials = 1
    assert dataclasses.replace(protocol, trials=1) != protocol
