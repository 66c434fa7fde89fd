"""benchmarks/cycles.py, against a sum by hand."""

import pathlib
import re
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import cycles

# A loop of five rounds within one of three; an estimate inside of a fusion is
# not one more.
_SHORT = """HloModule jit_step, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  ROOT %sum = bf16[] add(%x, %y)
}

%fused (p: f32[2,8]) -> f32[8] {
  %inner = f32[2,8]{1,0} negate(%p), estimated=999
  ROOT %reduce-scatter = f32[8]{0} reduce-scatter(%inner), to_apply=%add
}

%inner_cond (a: (s32[])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%inner_body (a: (s32[])) -> (s32[]) {
  %f.1 = f32[8]{0} fusion(%b), kind=kLoop, calls=%fused, estimated=7
  ROOT %t = (s32[]) tuple(%i)
}

%outer_cond (a: (s32[])) -> pred[] {
  %constant.2 = s32[] constant(3), metadata={op_name="constant(9)"}
  ROOT %lt.1 = pred[] compare(%i, %constant.2), direction=LT
}

%outer_body (a: (s32[])) -> (s32[]) {
  %w.1 = (s32[]) while(%a), condition=%inner_cond, body=%inner_body
  %copy.3 = bf16[4]{0} copy(%c), op_name="rematted_computation", estimated=20
  %ag.1 = (bf16[4]{0}, bf16[4,16]{1,0}) all-gather-start(%c), dimensions={0}
  %ag.2 = bf16[4,16]{1,0:T(8,128)(2,1)} all-gather-done(%ag.1)
  %splash_fwd.7 = f32[8]{0} custom-call(%c), target="tpu_custom_call"
  ROOT %t.1 = (s32[]) tuple(%i)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w.2 = (s32[]) while(%a), condition=%outer_cond, body=%outer_body
  %ar = (f32[8]{0}, pred[3]{0}) all-reduce(%x, %y), to_apply=%add
  ROOT %g.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%add, estimated=1000
}
"""
TEXT = re.sub(
  r"estimated=(\d+)",
  r'backend_config={"window_config":{"estimated_cycles":"\1"}}',
  _SHORT,
)


def test_loops_count_as_often_as_they_run():
  found = cycles.estimate(TEXT)
  assert found.cycles == 3 * 5 * 7 + 3 * 20 + 1000
  assert found.again == 3 * 20
  assert found.kernels == {"splash_fwd": 3}
  assert found.collectives == {
    "reduce-scatter": 3 * 5 * 8 * 4,
    "all-gather": 3 * 4 * 16 * 2,
    "all-reduce": 8 * 4 + 3,
  }


@pytest.mark.parametrize(
  ("part", "other", "says"),
  [
    ("estimated_cycles", "cycles", "not libtpu's"),
    ("constant(5)", "parameter(0)", "0 constants"),
  ],
)
def test_what_cannot_be_read_is_refused(part, other, says):
  with pytest.raises(ValueError, match=says):
    cycles.estimate(TEXT.replace(part, other))
