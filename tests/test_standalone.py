"""A decoder alone takes the tokens that a session takes, from the same logits."""

from __future__ import annotations

import pytest
import torch

from trtllm_core import BuildConfig, ModelRunner, SamplingConfig, StandaloneDecoder, use
from trtllm_core.errors import CapacityError, ConfigError, PluginError
from trtllm_core.plugin import HostLogitsProcessor, HostStoppingCriterion, Stop
from trtllm_core.testing.letters import letter_tokenizer
from trtllm_core.testing.markov import MarkovExecutable

BUILD = BuildConfig(max_batch_size=4, max_beam_width=4, max_input_len=39, max_seq_len=40, tokens_per_block=8)
PROMPTS = [[5, 6, 7], [11], [32, 17, 3, 3]]
BASE = SamplingConfig(end_id=9, max_new_tokens=16, output_log_probs=True, return_dict=True)
DRAWN = BASE.replace(top_k=0, top_p=0.9, random_seed=3)
PLANS = {
    "greedy": [BASE],
    "drawn, with penalties": [DRAWN.replace(repetition_penalty=1.4, frequency_penalty=0.3, min_length=5)],
    "several answers": [DRAWN.replace(num_return_sequences=3)],
    "beams": [BASE.replace(num_beams=4, length_penalty=0.6)],
    "beams of transformers": [BASE.replace(num_beams=3, num_return_sequences=2, preset="hf")],
    "groups": [BASE.replace(num_beams=4, decoder=use("diverse_beam_search", groups=2))],
    "text": [BASE.replace(stop_strings=("ab", "c"), no_repeat_ngram_size=2)],
    "mirostat": [DRAWN.replace(top_p=1.0, decoder=use("mirostat", tau=2.0))],
    "all kinds": [BASE.replace(num_beams=2), DRAWN.replace(num_return_sequences=4), BASE.replace(end_id=())],
}


@pytest.fixture(scope="module")
def runner():
    return ModelRunner.from_engine(MarkovExecutable(40, build=BUILD), tokenizer=letter_tokenizer(40, (9,)))


def made(**changes):
    arguments = {"max_batch_size": 4, "max_beam_width": 4, "max_seq_len": 40} | changes
    return StandaloneDecoder(40, tokenizer=letter_tokenizer(40, (9,)), **arguments)


def drive(decoder, rows, table):
    """Bring logits from a table until all is over, with a cache as a model keeps one: texts, by row."""
    caches = [[int(token)] for token in rows.tokens]
    while not decoder.over:
        rows = decoder.step(table[rows.tokens])
        parents = rows.parents.tolist()
        caches = [[*caches[row], int(token)] for row, token in zip(parents, rows.tokens, strict=True)]
        for cache, prompt, branch in zip(caches, rows.prompts, rows.branches, strict=True):
            assert cache[1:] == list(decoder.sequences(prompt)[branch].tokens), "caches follow the parents"


@pytest.mark.parametrize("plan", list(PLANS))
def test_it_takes_what_a_session_takes(runner, plan):
    configs = PLANS[plan] * 3 if len(PLANS[plan]) == 1 else PLANS[plan]
    decoder = made(debug_mode=True)
    for _ in range(2):
        drive(decoder, decoder.begin(PROMPTS, configs), runner.session.engine.table)
        found = [
            (str(prompt), one.tokens, one.reason, pytest.approx(one.log_probs, abs=1e-5), one.text)
            for prompt in range(3)
            for one in decoder.sequences(prompt).values()
        ]
        outputs = runner.generate(PROMPTS, configs, text=True)["outputs"]
        assert [(o.request_id, tuple(o.tokens), o.finish_reason, o.log_probs, o.text) for o in outputs] == found
    assert decoder.errors == [None] * 3


def test_logits_of_other_types_and_widths(runner):
    table = runner.session.engine.table
    decoder, plain = made(), made()
    drive(plain, plain.begin(PROMPTS, BASE), table.bfloat16().float())
    wide = torch.nn.functional.pad(table, (0, 8), value=1e9)
    wide[:, :40] = table.bfloat16()
    drive(decoder, decoder.begin(PROMPTS, BASE), wide.bfloat16())
    assert [decoder.sequences(i)[0].tokens for i in range(3)] == [plain.sequences(i)[0].tokens for i in range(3)]


class Fails(HostLogitsProcessor):
    def process(self, state, tokens, logits):
        raise ZeroDivisionError("so it is")


class Third(HostStoppingCriterion):
    def check(self, state, tokens, new):
        return Stop("third", 0) if len(tokens) == 3 else None


def test_objects_and_failures(runner):
    decoder = made()
    drive(decoder, decoder.begin([[5]], BASE, stopping_criteria=[Third()]), runner.session.engine.table)
    assert decoder.sequences(0)[0].reason == "third"
    assert len(decoder.sequences(0)[0].tokens) == 3
    drive(decoder, decoder.begin([[5]], BASE, logits_processors=[Fails()]), runner.session.engine.table)
    assert decoder.sequences(0)[0].reason == "plugin_error"
    assert isinstance(decoder.errors[0], PluginError)


def test_refusals(runner):
    decoder = made()
    with pytest.raises(ConfigError, match=r"logits \[1, 40\] are not \[0, 40\]"):
        decoder.step(torch.zeros(1, 40))
    rows = decoder.begin(PROMPTS, BASE)
    for shape in ((2, 40), (3, 39), (3, 1, 40)):
        with pytest.raises(ConfigError, match="are not"):
            decoder.step(torch.zeros(shape))
    with pytest.raises(ConfigError, match="3 prompts need one SamplingConfig or 3, not 2"):
        decoder.begin(PROMPTS, [BASE, BASE])
    for prompt in ([], [40], [-1]):
        with pytest.raises(ConfigError, match="must have tokens, all of them below 40"):
            decoder.begin([prompt], BASE)
    with pytest.raises(CapacityError, match="are 41 tokens; the decoder was made for 40"):
        decoder.begin([[5] * 25], BASE)
    with pytest.raises(CapacityError, match="more sequences than the 16"):
        decoder.begin([[5]] * 5, BASE.replace(num_beams=4))
    with pytest.raises(CapacityError, match="max_beam_width"):
        decoder.begin([[5]], BASE.replace(num_beams=5))
    with pytest.raises(ConfigError, match="needs 'hidden_states', which this session cannot give it"):
        decoder.begin([[5]], BASE.replace(decoder="contrastive_search"))
    with pytest.raises(ConfigError, match="needs 'multi_position'"):
        decoder.begin([[5]], BASE.replace(decoder="ngram"))
    assert decoder.over
    rows = decoder.begin(PROMPTS, BASE)  # nothing of all that is left
    drive(decoder, rows, runner.session.engine.table)
    assert decoder.over
