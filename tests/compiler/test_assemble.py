"""What artifact.json says of a model on a target."""

from compiler.assemble import describe
from model.config import MODELS
from schedules.attention import sm90
from schedules.targets import TARGETS


def test_unpacked_levels_are_said_where_a_prompt_unpacks_them():
    model = MODELS["bitnet-b1.58-2b-4t"].with_variant("a4.8")
    heads = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    said = describe(model, TARGETS["cuda-sm90"], [16, 3])["levels"]
    assert said == {"16": sm90.levels(*heads, 16), "3": sm90.levels(*heads, 3)}
    assert said["3"]["bytes"]
    assert "levels" not in describe(model, TARGETS["x86-avx2"], [16, 3])
