"""Each public name has a docstring with an example that runs, and each old argument name is accepted with a warning."""

import doctest
import inspect
import re
import warnings

import pytest
import torch

import fastkd
from fastkd import functional
from fastkd.deprecation import recompute_logits, renamed

PUBLIC = {name: getattr(module, name) for module in (functional, fastkd) for name in module.__all__}
RECORDS = [name for name, x in PUBLIC.items() if inspect.isclass(x) and issubclass(x, tuple)]  # fields, no behaviour


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - RECORDS))
def test_the_example_runs(name):
    found = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={"torch": torch, "fastkd": fastkd})
    assert found and found[0].examples, f"{name}: its docstring needs an example (>>>)"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        result = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(found[0])
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_argument_is_documented(name):
    subject = PUBLIC[name]
    calls = [subject] if name not in RECORDS else []
    if inspect.isclass(subject) and issubclass(subject, torch.nn.Module) and name != "VocabMap":
        calls.append(subject.forward)
    missing = [
        parameter
        for call in calls
        for parameter, how in inspect.signature(call).parameters.items()
        if parameter != "self" and how.kind not in (how.VAR_POSITIONAL, how.VAR_KEYWORD)
        if not re.search(rf"\b{parameter}\b(, \w+)*(:| \[)", inspect.getdoc(call) or "")
    ]
    assert inspect.getdoc(subject) and not missing, f"{name}: {missing} are not in its docstring"


def old_calls():
    hidden, other = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    heads = [torch.randn(2, 2, 5, 4) for _ in range(3)]
    head, codir = torch.randn(7, 6), {"n_data": 9, "feat_dim": 4, "nce_k": 3}
    return {
        "divergence": lambda: fastkd.divergence(hidden, teacher=other),
        "gram_correlation_loss": lambda: fastkd.gram_correlation_loss(student=hidden, teacher=other),
        "layer_costs": lambda: fastkd.layer_costs(students=[hidden], teachers=[other]),
        "attention_costs": lambda: fastkd.attention_costs(students=[tuple(heads[:2])], teachers=[tuple(heads[1:])]),
        "relation_kl_loss": lambda: fastkd.relation_kl_loss(student=heads, teacher=heads),
        "linear_divergence": lambda: fastkd.linear_divergence(
            hidden, head, other, head, memory="low", teacher_words="kept"
        ),
        "FCDLoss": lambda: fastkd.FCDLoss()(fs=hidden, ft=other),
        "BertEMDLoss": lambda: fastkd.BertEMDLoss(1, 1)(
            student_attn=None, teacher_attn=None, student_hidden=[hidden], teacher_hidden=[other]
        ),
        "CoDIRLoss": lambda: fastkd.CoDIRLoss(s_dim=6, t_dim=6, **codir)(
            f_s=hidden[0], f_t=other[0], idx=torch.arange(5)
        ),
        "GLMDLoss.stage": lambda: fastkd.GLMDLoss(stage="words"),
        "GLMDLoss.forward": lambda: fastkd.GLMDLoss()(hidden, other, stage="words"),
        "GLMDLoss": lambda: fastkd.GLMDLoss(teacher_words="kept").from_hidden(
            hidden, head, other, head, memory="speed"
        ),
        "MiniLMLoss": lambda: fastkd.MiniLMLoss()(student=heads, teacher=heads),
        "MiniLMv2Loss": lambda: fastkd.MiniLMv2Loss(2)(student=heads, teacher=heads),
        "Projection": lambda: fastkd.Projection(ds=6, dt=3)(hidden),
        "TinyBERTLoss": lambda: fastkd.TinyBERTLoss()(
            student_attn=None, teacher_attn=None, student_hidden=[hidden] * 2, teacher_hidden=[other] * 2
        ),
    }


@pytest.mark.parametrize("name", old_calls())
def test_old_names_are_accepted_with_a_warning_where_they_are_used(name):
    with pytest.warns(DeprecationWarning, match=r"is now called \S+; pass \w+=") as seen:
        old_calls()[name]()
    assert {warning.filename for warning in seen} == {__file__}


def test_a_renamed_argument_has_the_old_ones_value():
    @renamed(fs="student_hidden", memory=("recompute_logits", recompute_logits))
    def call(student_hidden, recompute_logits=False):
        return student_hidden, recompute_logits

    with pytest.warns(DeprecationWarning, match="fs is now called student_hidden"):
        assert call(fs=1, memory="low") == (1, True)
    with pytest.raises(TypeError, match="fs is the old name of student_hidden, and both were given"):
        call(fs=1, student_hidden=2)
    with (
        pytest.warns(DeprecationWarning, match="memory is now called recompute_logits"),
        pytest.raises(ValueError, match=r"recompute_logits: .* got 'fast'"),
    ):
        fastkd.linear_divergence(*(torch.ones(2, 2) for _ in range(4)), memory="fast")
