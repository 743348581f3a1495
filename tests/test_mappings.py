"""What names the nearest key for an error looks for it then alone, not whenever it is asked whether a key is there."""

import difflib
from collections.abc import Mapping
from inspect import isclass
from pkgutil import walk_packages

import dit_lens
from dit_lens.arguments.mappings import NamedMapping
from tests.channel_sets import sample_set


def find_mappings():
    for module in walk_packages(dit_lens.__path__, "dit_lens."):
        if not module.name.startswith("dit_lens.server"):
            found = vars(__import__(module.name, fromlist=["_"])).values()
            yield from (one for one in found if isclass(one) and one.__module__ == module.name)


def test_all_mappings_with_errors_of_their_own_look_at_their_keys_alone():
    own = {one for one in find_mappings() if issubclass(one, Mapping) and "__getitem__" in vars(one)}
    assert len(own) > 5
    plain = {one.__name__ for one in own if not issubclass(one, NamedMapping)}
    assert plain == {"Directions"}  # its error is that of a dict


def test_asking_for_a_key_searches_nothing(monkeypatch):
    chosen = sample_set(0)
    monkeypatch.setattr(difflib, "get_close_matches", None)
    assert "blocks.0.img" in chosen
    assert "blocks.0.imgs" not in chosen
    assert 3 not in chosen
    assert [] not in chosen
