"""Which group of a quantization_config a module belongs to."""

import pytest

from readers.errors import ReadError
from readers.quantization_groups import group_of

LINEARS, HEAD, LAYERS = {"targets": ["Linear"]}, {"targets": ["lm_head"]}, {"targets": [r"re:model\.layers\.\d+\.mlp"]}


@pytest.mark.parametrize(
    ("module", "groups", "found"),
    [
        ("lm_head", [LINEARS, HEAD], HEAD),  # whatever the order
        ("lm_head", [HEAD, LINEARS], HEAD),
        ("model.layers.3.mlp.up_proj", [LINEARS, HEAD, LAYERS], LAYERS),
        ("model.layers.3.self_attn.q_proj", [HEAD, LAYERS, LINEARS], LINEARS),
        ("model.layers.3.self_attn.q_proj", [HEAD, LAYERS], None),
        ("lm_head", [], None),
    ],
)
def test_a_group_that_names_a_module_goes_before_that_of_all_linears(module, groups, found):
    quantization = {"config_groups": {f"group_{number}": group for number, group in enumerate(groups)}}
    assert group_of(module, quantization) is found


def test_a_pattern_that_is_none_is_told():
    with pytest.raises(ReadError, match="a pattern that is not a regular expression"):
        group_of("lm_head", {"config_groups": {"group_0": {"targets": ["re:("]}}})
