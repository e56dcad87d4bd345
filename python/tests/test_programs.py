"""The optimizer in the programs that people have: PEFT, transformers' Trainer, TRL, accelerate, torch.compile, DDP.

Tiny random models; nothing is fetched. What is not installed is skipped.
"""

import importlib.util
import os
import pathlib
import pkgutil
import socket
import subprocess
import sys
import tempfile
import unittest
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch
from torch import nn

import lora_rite
import toy
from lora_rite import LoraRite, create_lora_rite_optimizer

try:
    import peft
    import transformers
    from peft import LoraConfig, get_peft_model
except ImportError:
    raise unittest.SkipTest("peft and transformers are not here") from None
if importlib.util.find_spec("trl"):
    import datasets
    import trl

    datasets.disable_progress_bars()
else:
    trl = None

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.simplefilter("ignore", FutureWarning)  # what one of them calls old in the other

DECODER = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def base(kind="Llama", head="ForCausalLM", **options):
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**DECODER, **options)
    return getattr(transformers, kind + head)(config)


def adapted(model=None, config=LoraConfig, **options):
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    model = model or base()
    torch.manual_seed(1)
    return get_peft_model(model, config(**options))


class Tokens(torch.utils.data.Dataset):
    """Random texts, the same at every call."""

    def __init__(self, count=32):
        generator = torch.Generator().manual_seed(5)
        self.texts = torch.randint(3, 48, (count, 10), generator=generator)

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"input_ids": self.texts[index], "labels": self.texts[index]}


def batch_of(number):
    """Two batches by turns."""
    return Tokens().texts[4 * (number % 2) :][:4]


def train(model, optimizer, steps, first=0):
    losses = []
    for number in range(first, first + steps):
        batch = batch_of(number)
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Peft(unittest.TestCase):
    def test_a_model_trains_and_its_base_stays(self):
        model = adapted()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = create_lora_rite_optimizer(model, lr=1e-2)
        losses = train(model, optimizer, 17)
        self.assertLess(losses[-1], losses[0] - 0.02)
        for name, p in model.named_parameters():
            self.assertEqual(torch.equal(p, before[name]), not p.requires_grad, name)

    def test_three_adapters_in_another_order(self):
        models = []
        for names in (("one", "two", "three"), ("three", "one", "two")):
            torch.manual_seed(1)
            model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name=names[0])
            for name in names[1:]:
                model.add_adapter(name, LoraConfig(r=4, target_modules=["q_proj"]))
            model.base_model.set_adapter(list(names))
            models.append(model)
        optimizers = [LoraRite(model, lr=1e-2) for model in models]
        train(models[0], optimizers[0], 3)
        models[1].load_state_dict(models[0].state_dict())
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        names = [[p.name for p in optimizer.diagnostics()] for optimizer in optimizers]
        self.assertNotEqual(*names)
        for name in names[0]:
            one, two = (optimizer.state_of(name) for optimizer in optimizers)
            self.assertTrue(torch.equal(one["b"]["momentum"], two["b"]["momentum"]), name)
        # Sums over pairs are in another order.
        for one, two in zip(*(train(m, o, 3, first=3) for m, o in zip(models, optimizers))):
            self.assertAlmostEqual(one, two, places=5)

    def test_heads_and_magnitudes_are_stepped_by_adamw(self):
        model = base(head="ForSequenceClassification", num_labels=3)
        model = adapted(model, use_dora=True, task_type="SEQ_CLS", target_modules=["q_proj"])
        optimizer = LoraRite(model, others={"lr": 1e-3})
        names = optimizer.param_groups[1]["param_names"]
        self.assertEqual(sum("lora_magnitude_vector" in name for name in names), 2)
        self.assertTrue(any("score" in name for name in names))
        self.assertFalse(any("lora_A" in name or "lora_B" in name for name in names))

    def test_adapters_that_become_active_later_are_trained_whole(self):
        def config():
            return LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", use_dora=True)

        model = get_peft_model(base(head="ForSequenceClassification", num_labels=3), config(), adapter_name="first")
        model.add_adapter("second", config())
        optimizer = LoraRite(model, lr=1e-2)
        model.set_adapter("second")
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.assertTrue(any("magnitude" in name for name in before) and any("score" in name for name in before))
        for _ in range(2):  # A's gradient is zero where B is
            optimizer.zero_grad()
            model(input_ids=torch.arange(12).view(3, 4), labels=torch.tensor([0, 1, 2])).loss.backward()
            optimizer.step()
        still = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
        self.assertEqual(still, [])

    def test_embeddings_and_convolutions_are_pairs(self):
        model = adapted(target_modules=["embed_tokens", "q_proj"])
        optimizer = LoraRite(model, lr=1e-2)
        self.assertEqual(len(optimizer.param_groups), 1)
        self.assertEqual(len(optimizer.diagnostics()), 3)
        train(model, optimizer, 2)

    def test_experts_by_target_parameters_are_pairs_of_their_own(self):
        model = base("Mixtral", num_local_experts=3, num_experts_per_tok=2, sliding_window=None)
        names = [name for name, p in model.named_parameters() if p.dim() == 3]
        self.assertTrue(names)
        targets = sorted({".".join(name.split(".")[-3:]) for name in names})
        model = adapted(model, target_modules=[], target_parameters=targets)
        optimizer = LoraRite(model, lr=1e-2)
        told = [p.name for p in optimizer.diagnostics()]
        self.assertEqual(len(told), 3 * len(names))
        self.assertEqual(sum(name.endswith("[2]") for name in told), len(names))
        self.assertEqual(len(optimizer.param_groups), 1)
        losses = train(model, optimizer, 9)
        self.assertLess(losses[-1], losses[0])

    def test_other_kinds_of_adapters_are_refused_by_name(self):
        for config, name in (
            (peft.LoHaConfig, "hada_w1_a.* is one of LoHa, "), (peft.LoKrConfig, "lokr_w1.* is one of LoKr, "),
            (peft.VeraConfig, "vera_lambda.* is one of VeRA, "),
        ):  # fmt: skip
            with self.assertRaisesRegex(ValueError, name):
                LoraRite(adapted(config=config, target_modules=["q_proj"]))
        with self.assertRaisesRegex(ValueError, "lora_E.*AdaLoRA"):
            LoraRite(adapted(config=peft.AdaLoraConfig, total_step=10, target_modules=["q_proj"]))

    def test_a_model_with_two_kinds_of_adapters_is_refused_by_name_and_trains_when_told_how(self):
        torch.manual_seed(1)
        model = peft.PeftMixedModel(base(), LoraConfig(r=4, target_modules=["q_proj"]), "lora")
        model.add_adapter("loha", peft.LoHaConfig(r=4, target_modules=["v_proj"]))
        model.set_adapter(["lora", "loha"])
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.assertEqual(len(named), 2 * 2 + 2 * 4)
        with self.assertRaisesRegex(ValueError, "v_proj.hada_w1_a.loha' is one of LoHa, "):
            LoraRite(model)
        groups = [
            {"params": [(name, p) for name, p in named if "hada_" not in name]},
            {"params": [p for name, p in named if "hada_" in name], "adamw": True},
        ]
        before = toy.trained(model)
        train(model, LoraRite(groups, lr=1e-2), 2)
        self.assertTrue(toy.moved(before, toy.trained(model)))

    def test_all_kinds_that_peft_has_are_known(self):
        """What PEFT's layers have for adapters is found as a pair, is a companion of one, or is refused by name."""
        known = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "supertuning_lora_A", "supertuning_lora_B"}
        known |= {"lora_magnitude_vector", "supertuning_values"}  # AdamW's
        known |= {"trainable_tokens_delta", "ln_tuning_layers"}  # the model's own weights, and what is added to them
        known |= {"shadow_dropout", "shadow_update_transform", "shadow_update_gate"}  # beside shadow_down
        for kind in pkgutil.iter_modules(peft.tuners.__path__, "peft.tuners."):
            if kind.ispkg:
                importlib.import_module(kind.name)
        kinds = {peft.tuners.tuners_utils.BaseTunerLayer}
        while more := {kind for one in kinds for kind in one.__subclasses__()} - kinds:
            kinds |= more
        names = {name for kind in kinds for name in kind.adapter_layer_names} - known
        self.assertGreater(len(names), 40)
        for name in sorted(names):
            net = nn.ModuleDict({"net": toy.model(), "q": nn.ParameterDict({name: torch.randn(2, 8)})})
            with self.subTest(name), self.assertRaisesRegex(ValueError, rf"'q\.{name}' "):
                LoraRite(net)

    def test_half_precision_models_train(self):
        model = adapted(base().to(torch.bfloat16), target_modules=["q_proj"])  # PEFT makes the factors float
        for cast in (False, True):
            model = model.to(torch.bfloat16) if cast else model
            optimizer = LoraRite(model, lr=1e-2, master_weights=cast)
            losses = train(model, optimizer, 9)
            self.assertLess(losses[-1], losses[0])


class Trainer(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def trainer(self, name, model, **options):
        given = {"max_grad_norm": 0, "max_steps": 8, "save_steps": 4, **options.pop("args", {})}
        args = transformers.TrainingArguments(
            output_dir=str(pathlib.Path(self.folder.name) / name), per_device_train_batch_size=4, logging_steps=1,
            use_cpu=True, report_to=[], disable_tqdm=True, seed=3, lr_scheduler_type="cosine", **given,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=args, train_dataset=Tokens(), **options)
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def losses(self, trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def run_quietly(self, trainer, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer.train(**options)
        self.assertEqual(trainer.state.global_step, 8)
        return self.losses(trainer)

    def test_a_run_that_resumes_in_the_middle_is_the_uninterrupted_one_to_the_bit(self):
        models = adapted(), adapted()
        trainers = [
            self.trainer(name, model, optimizers=(create_lora_rite_optimizer(model, lr=1e-2), None))
            for name, model in zip(("whole", "resumed"), models)
        ]
        whole = self.run_quietly(trainers[0])
        self.assertEqual(len(whole), 8)
        checkpoint = pathlib.Path(self.folder.name) / "whole/checkpoint-4"
        resumed = self.run_quietly(trainers[1], resume_from_checkpoint=str(checkpoint))
        self.assertEqual(resumed, whole)
        self.assertTrue(toy.same(*map(toy.trained, models)))
        self.assertLess(whole[-1], whole[0])

    def test_another_scheduler_and_accumulated_gradients(self):
        model = adapted()
        optimizer = LoraRite(model, lr=1e-2)
        scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, 8)
        args = {"gradient_accumulation_steps": 2}
        losses = self.run_quietly(self.trainer("accumulated", model, optimizers=(optimizer, scheduler), args=args))
        self.assertLess(losses[-1], losses[0])
        self.assertEqual(optimizer.param_groups[0]["lr"], 0)

    def test_optimizer_cls_and_kwargs_with_the_model_among_them(self):
        for name, cls, kwargs in (
            ("class", LoraRite, lambda model: {"model": model, "lr": 1e-2, "escape": False}),
            ("factory", lambda: create_lora_rite_optimizer, lambda model: {"lr": 1e-2, "escape": False}),
        ):
            model = adapted()
            trainer = self.trainer(name, model, optimizer_cls_and_kwargs=(cls, kwargs(model)))
            losses = self.run_quietly(trainer)
            self.assertLess(losses[-1], losses[0])
            self.assertIsInstance(trainer.optimizer.optimizer, LoraRite)
            self.assertIs(trainer.optimizer.param_groups[0]["escape"], False)
        with self.assertRaisesRegex(ValueError, "params has a tensor without a name"):  # Trainer's groups have none
            self.trainer("bare", adapted(), optimizer_cls_and_kwargs=(LoraRite, {"lr": 1e-2})).create_optimizer()

    def test_max_grad_norm_is_warned_of_once(self):
        model = adapted()
        optimizer = LoraRite(model, lr=1e-2)
        trainer = self.trainer("clipped", model, optimizers=(optimizer, None), args={"max_grad_norm": 1.0})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        about = [str(w.message) for w in caught if "max_grad_norm" in str(w.message)]
        self.assertEqual(len(about), 1, about)
        self.assertIn("clip_unmagnified_norm", about[0])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            other = adapted()
            self.trainer("unclipped", other, optimizers=(LoraRite(other), None)).train()
        self.assertFalse([w for w in caught if "max_grad_norm" in str(w.message)])

    @unittest.skipIf(trl is None, "trl is not installed")
    def test_sft_trainer_of_trl(self):
        import tokenizers

        words = {f"w{i}": i for i in range(3, 48)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
        texts = [" ".join(f"w{t}" for t in text.tolist()) for text in Tokens().texts]
        losses, models = [], (adapted(), adapted())
        for name, model in zip(("whole", "resumed"), models):
            args = trl.SFTConfig(
                output_dir=str(pathlib.Path(self.folder.name) / name), per_device_train_batch_size=4, logging_steps=1,
                use_cpu=True, report_to=[], disable_tqdm=True, max_grad_norm=0, max_steps=8, save_steps=4, seed=3,
                max_length=16, bf16=False, gradient_checkpointing=False,
            )  # fmt: skip
            trainer = trl.SFTTrainer(
                model=model, args=args, train_dataset=datasets.Dataset.from_dict({"text": texts}),
                processing_class=tokenizer, optimizers=(create_lora_rite_optimizer(model, lr=1e-2), None),
            )  # fmt: skip
            trainer.remove_callback(transformers.PrinterCallback)
            resume = None if name == "whole" else str(pathlib.Path(self.folder.name) / "whole/checkpoint-4")
            losses.append(self.run_quietly(trainer, resume_from_checkpoint=resume))
        self.assertEqual(*losses)
        self.assertLess(losses[0][-1], losses[0][0])
        self.assertTrue(toy.same(*map(toy.trained, models)))


class Loops(unittest.TestCase):
    def test_accelerate_saves_and_resumes_and_accumulates(self):
        from accelerate import Accelerator

        def run(folder=None, resume=False):
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            model = adapted()
            optimizer = LoraRite(model, lr=1e-2)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            loader = torch.utils.data.DataLoader(Tokens(), batch_size=4)
            optimizer, model, loader, scheduler = accelerator.prepare(optimizer, model, loader, scheduler)
            accelerator.register_for_checkpointing()
            losses = []
            if resume:
                accelerator.load_state(folder)
            for number, batch in enumerate(loader):
                if resume and number < 4:
                    continue
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
                if folder and not resume and number == 3:
                    accelerator.save_state(folder)
            return losses

        with tempfile.TemporaryDirectory() as folder:
            whole = run(folder)
            self.assertEqual(run(folder, resume=True), whole[4:])

    def test_a_plain_loop_under_torch_compile(self):
        torch.manual_seed(0)
        nets = [toy.model() for _ in range(3)]
        optimizers = [LoraRite(net, lr=1e-2) for net in (nets[0], torch.compile(nets[1], backend="aot_eager"), nets[2])]
        compiled = torch.compile(nets[1], backend="aot_eager")

        @torch.compile(backend="aot_eager")
        def whole_step(net, optimizer, x):
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        for number in range(4):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(number))
            for net, optimizer in ((nets[0], optimizers[0]), (compiled, optimizers[1])):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
            whole_step(nets[2], optimizers[2], x)
        expected = toy.trained(nets[0])
        for net in nets[1:]:
            for name, parameter in toy.trained(net).items():
                torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)

    def test_shards_of_fsdp_are_refused(self):
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        self.addCleanup(torch.distributed.destroy_process_group)
        model = adapted()
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with self.assertRaisesRegex(ValueError, r"layers.0.self_attn.q_proj.default.weight': factor a is a DTensor"):
            LoraRite(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = FullyShardedDataParallel(adapted(), device_id=torch.device("cpu"), use_orig_params=True)
        with self.assertRaisesRegex(ValueError, "sharded by FullyShardedDataParallel"):
            LoraRite(model)

    def test_two_processes_by_ddp_train_as_one_on_the_whole_batch(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
            here = [sys.executable, __file__, "--process-of-ddp", folder]
            processes = [subprocess.Popen(here, env={**environment, "RANK": str(rank)}) for rank in (0, 1)]
            self.assertEqual([process.wait(timeout=300) for process in processes], [0, 0])
            one, two = (torch.load(pathlib.Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1))
        self.assertTrue(toy.same(one["parameters"], two["parameters"]))
        model = adapted()
        optimizer = LoraRite(model, lr=1e-2)
        train(model, optimizer, 3)
        self.assertEqual(one["names"], [p.name for p in optimizer.diagnostics()])
        for name, parameter in toy.trained(model).items():
            torch.testing.assert_close(one["parameters"]["module." + name], parameter, rtol=1e-3, atol=1e-5)


def process_of_ddp(folder):
    """Three steps of one of two processes, each with half of every batch."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = nn.parallel.DistributedDataParallel(adapted())
    optimizer = LoraRite(model, lr=1e-2)
    for number in range(3):
        batch = batch_of(number)[2 * rank :][:2]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    names = [p.name for p in optimizer.diagnostics()]
    torch.save({"parameters": toy.trained(model), "names": names}, pathlib.Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(2)
    if "--process-of-ddp" in sys.argv:
        process_of_ddp(sys.argv[-1])
    else:
        print("lora_rite", lora_rite.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
        unittest.main()
