"""Steps of TRL's GRPOTrainer: `python trl_worker.py REQUEST`, in an environment with trl, transformers and torch.

It imports nothing of ours. REQUEST is a JSON file:

"model": a folder of transformers' form, with a vocabulary of 256 bytes;
"prompts", "answers": text of every question in the order of training, and its right answer;
"per_step", "n", "new_tokens", "temperature", "lr", "stop": prompts of a step, outputs of each, tokens at most, the
character that ends an output;
"threads", "seed"; "facts": a file that gets one line of JSON for each step: mean reward, and tokens that were sampled;
"work": a folder for what the trainer writes.

Every line at stdin is answered by a line `SECONDS x`, the CPU seconds of this process for each token that one whole step
sampled: sampling, rewards, backward, update. It ends at the end of its input.

The loss is GRPO's (`loss_type="grpo"`, rewards over the deviation of their group, no KL), AdamW at a constant rate.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def tokenizer_of(stop: str) -> Any:
    """A token for each byte, as a fast tokenizer of transformers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({chr(byte): byte for byte in range(256)}, unk_token="\x00"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=stop, pad_token="\x00", padding_side="left", clean_up_tokenization_spaces=False
    )


def main(request: dict[str, Any]) -> None:
    """Train until the input ends."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(request["threads"])
    facts = Path(request["facts"])
    step = {"reward": 0.0, "tokens": 0}

    def reward(prompts: list[str], completions: list[str], completion_ids: list[Any], **more: Any) -> list[float]:
        found = [float(text.strip() == right) for text, right in zip(completions, more["answer"], strict=True)]
        step["reward"], step["tokens"] = sum(found) / len(found), sum(map(len, completion_ids))
        return found

    class Turns(TrainerCallback):
        """One step for each line."""

        start = 0.0

        def on_step_begin(self, *given: Any, **more: Any) -> None:
            if not sys.stdin.readline():
                os._exit(0)
            self.start = time.process_time()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            seconds = time.process_time() - self.start
            with facts.open("a", encoding="utf-8") as file:
                file.write(json.dumps(step) + "\n")
            print(f"SECONDS {seconds / step['tokens']!r}", flush=True)

    rows = request["per_step"] * request["n"]
    cfg = GRPOConfig(
        output_dir=request["work"], per_device_train_batch_size=rows, num_generations=request["n"],
        max_completion_length=request["new_tokens"], temperature=request["temperature"], top_p=1.0, top_k=0, beta=0.0,
        loss_type="grpo", scale_rewards="group", learning_rate=request["lr"], lr_scheduler_type="constant",
        weight_decay=0.0, max_grad_norm=1.0, max_steps=len(request["prompts"]) // request["per_step"],
        shuffle_dataset=False, use_cpu=True,
        bf16=False, fp16=False, gradient_checkpointing=False, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, seed=request["seed"], dataloader_num_workers=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    trainer = GRPOTrainer(
        model, reward, cfg, Dataset.from_dict({"prompt": request["prompts"], "answer": request["answers"]}),
        processing_class=tokenizer_of(request["stop"]), callbacks=[Turns()],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
