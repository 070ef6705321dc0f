"""A script as people had them for tensorrt_llm 0.10 and after. Nothing in it knows of trtllm-core."""

import argparse
import json

import numpy as np
import tensorrt_llm
import tensorrt_llm.profiler
import torch
from tensorrt_llm.logger import logger
from tensorrt_llm.runtime import (
    PYTHON_BINDINGS,
    LogitsProcessor,
    LogitsProcessorList,
    ModelRunner,
    StoppingCriteria,
    StoppingCriteriaList,
    to_word_list_format,
)
from transformers import AutoTokenizer

if PYTHON_BINDINGS:
    from tensorrt_llm.runtime import ModelRunnerCpp


def parse_arguments(args=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine_dir", type=str, default="engine_outputs")
    parser.add_argument("--tokenizer_dir", type=str, required=True)
    parser.add_argument("--input_text", type=str, nargs="+", required=True)
    parser.add_argument("--max_output_len", type=int, default=12)
    parser.add_argument("--max_attention_window_size", type=int, default=None)
    parser.add_argument("--sink_token_length", type=int, default=None)
    parser.add_argument("--log_level", type=str, default="error")
    parser.add_argument("--use_py_session", action="store_true")
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--streaming_interval", type=int, default=1)
    parser.add_argument("--stop_words", type=str, nargs="+", action="append")
    parser.add_argument("--ban_letters", type=str, default="")
    parser.add_argument("--stop_after", type=int, default=None)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=1)
    parser.add_argument("--top_p", type=float, default=0.0)
    parser.add_argument("--length_penalty", type=float, default=1.0)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--presence_penalty", type=float, default=0.0)
    parser.add_argument("--frequency_penalty", type=float, default=0.0)
    parser.add_argument("--early_stopping", type=int, default=1)
    parser.add_argument("--run_profiling", action="store_true")
    parser.add_argument("--output_npy", type=str, default=None)
    return parser.parse_args(args=args)


class BanTokens(LogitsProcessor):
    def __init__(self, ids):
        self.ids = torch.tensor(ids, dtype=torch.int64, device="cuda")

    def __call__(self, step: int, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids.shape[0] == scores.shape[0]
        scores[:, self.ids] = torch.finfo(scores.dtype).min
        return scores


class StopAfter(StoppingCriteria):
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, step: int, input_ids: torch.Tensor, scores: torch.Tensor) -> bool:
        return step + 1 >= self.steps


def print_output(tokenizer, output_ids, input_lengths, sequence_lengths):
    batch_size, num_beams, _ = output_ids.size()
    for batch_idx in range(batch_size):
        for beam in range(num_beams):
            output_begin = input_lengths[batch_idx]
            output_end = sequence_lengths[batch_idx][beam]
            outputs = output_ids[batch_idx][beam][output_begin:output_end].tolist()
            text = tokenizer.decode(outputs)
            print("OUTPUT", json.dumps([batch_idx, beam, outputs, text]), flush=True)


def throttle_generator(generator, stream_interval):
    for i, out in enumerate(generator):
        if not i % stream_interval:
            yield out
    if i % stream_interval:
        yield out


def main(args):
    runtime_rank = tensorrt_llm.mpi_rank()
    logger.set_level(args.log_level)

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_dir)
    end_id = tokenizer.eos_token_id
    pad_id = tokenizer.eos_token_id

    batch_input_ids = [
        torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.int32).cuda()
        for text in args.input_text
    ]
    input_lengths = [x.size(0) for x in batch_input_ids]

    stop_words_list = None
    if args.stop_words:
        stop_words_list = to_word_list_format(args.stop_words, tokenizer)
        stop_words_list = torch.Tensor(stop_words_list).to(torch.int32).to("cuda").contiguous()

    logits_processor = None
    if args.ban_letters:
        ids = tokenizer.encode(args.ban_letters, add_special_tokens=False)
        logits_processor = LogitsProcessorList([BanTokens(ids)])
    stopping_criteria = None
    if args.stop_after is not None:
        stopping_criteria = StoppingCriteriaList([StopAfter(args.stop_after)])

    runner_cls = ModelRunner if args.use_py_session else ModelRunnerCpp
    runner_kwargs = {"engine_dir": args.engine_dir, "lora_dir": None, "rank": runtime_rank, "debug_mode": False}
    if not args.use_py_session:
        runner_kwargs.update(
            max_batch_size=len(batch_input_ids),
            max_input_len=max(input_lengths),
            max_output_len=args.max_output_len,
            max_beam_width=args.num_beams,
            max_attention_window_size=args.max_attention_window_size,
            sink_token_length=args.sink_token_length,
            kv_cache_enable_block_reuse=False,
            kv_cache_free_gpu_memory_fraction=0.9,
            enable_chunked_context=False,
        )
    runner = runner_cls.from_dir(**runner_kwargs)

    if args.run_profiling:
        tensorrt_llm.profiler.start("generate")
    with torch.no_grad():
        outputs = runner.generate(
            batch_input_ids,
            max_new_tokens=args.max_output_len,
            max_attention_window_size=args.max_attention_window_size,
            sink_token_length=args.sink_token_length,
            end_id=end_id,
            pad_id=pad_id,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            num_beams=args.num_beams,
            length_penalty=args.length_penalty,
            early_stopping=args.early_stopping,
            repetition_penalty=args.repetition_penalty,
            presence_penalty=args.presence_penalty,
            frequency_penalty=args.frequency_penalty,
            stop_words_list=stop_words_list,
            bad_words_list=None,
            lora_uids=None,
            prompt_table=None,
            prompt_tasks=None,
            streaming=args.streaming,
            output_sequence_lengths=True,
            return_dict=True,
            stopping_criteria=stopping_criteria,
            logits_processor=logits_processor,
            medusa_choices=None,
        )
        torch.cuda.synchronize()

    if args.streaming:
        for curr_outputs in throttle_generator(outputs, args.streaming_interval):
            if runtime_rank == 0:
                print("STEP")
                print_output(tokenizer, curr_outputs["output_ids"], input_lengths, curr_outputs["sequence_lengths"])
    elif runtime_rank == 0:
        print_output(tokenizer, outputs["output_ids"], input_lengths, outputs["sequence_lengths"])
        if args.output_npy is not None:
            np.save(args.output_npy, outputs["output_ids"].cpu().contiguous().numpy())
        assert not runner.gather_context_logits
        assert runner.vocab_size_padded >= runner.vocab_size
    if args.run_profiling:
        tensorrt_llm.profiler.stop("generate")
        assert tensorrt_llm.profiler.elapsed_time_in_sec("generate") > 0
        tensorrt_llm.profiler.summary()


if __name__ == "__main__":
    main(parse_arguments())
