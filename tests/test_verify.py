"""Tests parity with golden outputs of the public implementation on tiny checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from safetensors.numpy import load_file, save_file

from diffusiongemma import verify
from diffusiongemma.checkpoints.load import load_model

DATA = Path(__file__).parent / 'data'


def load_golden(name):
    return dict(np.load(DATA / name / 'golden.npz'))


@pytest.fixture(scope='module')
def heldout():
    """Returns model, parameters, golden arrays and outputs of the held-out checkpoint."""
    model, params, _ = load_model(DATA / 'tiny_heldout')
    golden = load_golden('tiny_heldout')
    return model, params, golden, verify.golden_passes(model, params, golden)


@pytest.mark.slow
def test_all_passes_of_a_mixture_of_experts_agree_with_the_reference():
    model, params, _ = load_model(DATA / 'tiny_moe')
    golden = load_golden('tiny_moe')
    found = verify.differences(verify.golden_passes(model, params, golden), golden)
    assert set(found) == {
        'encoder_hidden', 'encoder_logits', 'logits_step0', 'logits_step1', 'next_encoder_logits',
        'logits_canvas2', 'accepted', 'token_entropy', 'ar_ce',
    }  # fmt: skip
    assert verify.holds(found), found


@pytest.mark.slow
def test_all_passes_agree_for_other_widths_patterns_expert_counts_and_batch_sizes(heldout):
    _, _, golden, outputs = heldout
    found = verify.differences(outputs, golden)
    assert verify.holds(found), found


def test_a_chain_of_our_own_denoise_steps_stays_close_to_the_reference(heldout):
    _, _, golden, outputs = heldout
    np.testing.assert_allclose(outputs['chained_step1'], golden['logits_step1'], atol=2e-3)


@pytest.mark.slow
def test_padding_on_the_left_of_some_rows_changes_nothing(heldout):
    model, params, golden, _ = heldout
    extra, width = 4, golden['prompt'].shape[1]

    def shift(row, values, fill):
        """Keeps row 1 right-aligned and moves the others to the left end of the padding."""
        padding = np.full((extra, *values.shape[1:]), fill, values.dtype)
        return np.concatenate([padding, values] if row == 1 else [values, padding])

    padded = dict(golden)
    fills = {'prompt': 0, 'encoder_hidden': np.nan, 'encoder_logits': np.nan}
    for name, fill in fills.items():
        padded[name] = np.stack([shift(i, row, fill) for i, row in enumerate(golden[name])])
    mask = np.zeros((len(golden['prompt']), width + extra), bool)
    mask[1, extra:] = mask[0, :width] = mask[2, :width] = True
    padded['prompt_mask'] = mask
    found = verify.differences(verify.golden_passes(model, params, padded), padded)
    assert verify.holds(found), found


def test_a_golden_value_that_is_no_number_fails(heldout):
    _, _, golden, outputs = heldout
    broken = golden | {'logits_canvas2': golden['logits_canvas2'].copy()}
    broken['logits_canvas2'][0, 0, 0] = np.nan
    assert not verify.holds(verify.differences(outputs, broken))


def test_one_accepted_position_more_fails(heldout):
    _, _, golden, outputs = heldout
    accepted = golden['accepted'].copy()
    accepted[0, np.argmin(accepted[0])] = True
    found = verify.differences(outputs, golden | {'accepted': accepted})
    assert found['accepted'] == 1
    assert not verify.holds(found)


def run_main(checkpoint, golden, capsys):
    """Returns the exit code and the last printed line of the program."""
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(checkpoint=str(checkpoint), golden=str(golden)):
        with pytest.raises(SystemExit) as exit_info:
            verify.main(['verify'])
    return exit_info.value.code, capsys.readouterr().out.strip().splitlines()[-1]


def test_the_program_prints_differences_as_json_and_exits_with_0(capsys):
    code, line = run_main(DATA / 'tiny_heldout', DATA / 'tiny_heldout' / 'golden.npz', capsys)
    assert code == 0
    assert max(json.loads(line).values()) <= verify.TOLERANCE


@pytest.mark.parametrize(
    ('tensor', 'untouched'),
    [
        # Only outputs that use the tensor may change; confusing the two scalars would fail here.
        ('model.decoder.layers.2.layer_scalar', ['encoder_logits', 'next_encoder_logits']),
        ('model.decoder.self_conditioning.pre_norm.weight', ['encoder_logits', 'logits_step0']),
        ('model.decoder.layers.1.experts.down_proj', []),
    ],
)
def test_one_corrupted_number_makes_the_program_exit_with_1(tmp_path, capsys, tensor, untouched):
    shutil.copytree(DATA / 'tiny_heldout', tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / 'model.safetensors')
    tensors[tensor].flat[0] += 0.1
    save_file(tensors, tmp_path / 'model.safetensors')
    code, line = run_main(tmp_path, tmp_path / 'golden.npz', capsys)
    found = json.loads(line)
    assert code == 1
    assert max(found.values()) > verify.TOLERANCE
    assert all(found[name] <= verify.TOLERANCE for name in untouched)


def test_a_golden_file_of_another_vocabulary_is_named(heldout):
    model, params, _, _ = heldout
    with pytest.raises(ValueError, match='vocabulary of the checkpoint has 201'):
        verify.golden_passes(model, params, load_golden('tiny_moe'))


def test_a_golden_file_without_an_input_is_named(heldout):
    model, params, golden, _ = heldout
    short = {name: value for name, value in golden.items() if name != 'commit'}
    with pytest.raises(ValueError, match=r"lacks \['commit'\]"):
        verify.golden_passes(model, params, short)


def test_the_verdict_says_what_differs_first_and_what_to_look_at():
    same = dict.fromkeys(verify.ARRAYS, 0.0) | {'logits_step1': 3e-6}
    text = verify.verdict('DIR', same)
    assert text.startswith(
        'DIR holds: it differs from the golden outputs by at most 3.0e-06 (in log'
    )
    assert text.endswith('Next: python -m diffusiongemma.sample --checkpoint=DIR')
    broken = same | {'logits_step1': float('nan'), 'logits_canvas2': 0.5}
    text = verify.verdict('DIR', broken)
    assert text.startswith('DIR does not hold: logits_step1 differs by nan (0.0001 is allowed')
    assert '2 of 9 arrays that differ' in text and len(text.splitlines()) == 1
    assert 'accepted differs at 3 positions' in verify.verdict('DIR', same | {'accepted': 3})
