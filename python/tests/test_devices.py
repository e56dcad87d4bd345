"""States and files of one device load on another; steps on a GPU."""

import io
import pathlib
import tempfile
import unittest
import zipfile

import torch

import toy
from lora_rite import LoraRite, kernel_name


def as_if_saved_on_a_gpu(saved):
    """A file of torch.save or torch::save, in which the tensors' storages are said to have been on "cuda:0"."""
    result, count = io.BytesIO(), 0
    text = lambda device: b"X" + len(device).to_bytes(4, "little") + device
    with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(result, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith(".pkl"):
                count += content.count(text(b"cpu"))
                content = content.replace(text(b"cpu"), text(b"cuda:0"))
            new.writestr(entry.filename, content)
    assert count > 0, "the file names no device"
    return result.getvalue()


def same_state(one, other):
    """Do two optimizers remember the same of their pairs?"""
    for name in (pair.name for pair in one.diagnostics()):
        for side in "ab":
            both = (optimizer.state_of(name)[side]["momentum"].cpu() for optimizer in (one, other))
            if not torch.equal(*both):
                return False
    return True


class OtherDevices(unittest.TestCase):
    def setUp(self):
        self.net = toy.model()
        self.optimizer = LoraRite(self.net, lr=1e-2)
        toy.train(self.net, self.optimizer, 3)

    def check_goes_on(self, load):
        """Does another optimizer go on as this one when it has loaded its state?"""
        net = toy.model()
        net.load_state_dict(self.net.state_dict())
        other = LoraRite(net, lr=1e-2)
        load(other)
        self.assertTrue(same_state(self.optimizer, other))
        self.assertEqual(toy.train(net, other, 2, first=3), toy.train(self.net, self.optimizer, 2, first=3))

    @unittest.skipIf(kernel_name() == "none", "engine 'host' has no kernels here")
    def test_states_of_the_engine_of_gpus_and_of_that_of_cpus_are_the_same(self):
        for there, here in (("host", "device"), ("device", "host")):
            with self.subTest(there):
                net = toy.model()
                optimizer = LoraRite(net, lr=1e-2, engine=there)
                toy.train(net, optimizer, 3)
                other_net = toy.model()
                other_net.load_state_dict(net.state_dict())
                other = LoraRite(other_net, lr=1e-2, engine=here)
                other.load_state_dict(optimizer.state_dict())
                self.assertTrue(same_state(optimizer, other))
                for one, two in zip(toy.train(net, optimizer, 3, first=3), toy.train(other_net, other, 3, first=3)):
                    self.assertAlmostEqual(one, two, places=5)

    def test_a_state_of_a_gpu_loads_on_a_cpu(self):
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file = io.BytesIO(as_if_saved_on_a_gpu(file.getvalue()))
        if not torch.cuda.is_available():
            with self.assertRaisesRegex(RuntimeError, "CUDA"):
                torch.load(file, weights_only=True)
            file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.check_goes_on(lambda other: other.load_state_dict(state))

    def test_a_file_of_a_gpu_loads_on_a_cpu(self):
        for name in ("load", "load_matching"):
            with self.subTest(name), tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "optimizer.pt"
                self.optimizer.save(path)
                path.write_bytes(as_if_saved_on_a_gpu(path.read_bytes()))
                self.check_goes_on(lambda other, load=name, path=path: getattr(other, load)(path))


@unittest.skipUnless(torch.cuda.is_available(), "no GPU is here")
class Cuda(unittest.TestCase):
    def pair_of_optimizers(self):
        """Of a CPU and a GPU, after three steps of the one on the CPU."""
        nets = toy.model(), toy.model().cuda()
        optimizers = [LoraRite(net, lr=1e-2) for net in nets]
        self.steps(nets[0], optimizers[0], 3)
        return nets, optimizers

    def steps(self, net, optimizer, count):
        """Steps with gradients that do not depend on the device."""
        for number in range(count):
            generator = torch.Generator().manual_seed(number)
            for parameter in filter(lambda p: p.requires_grad, net.parameters()):
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            optimizer.step()

    def test_states_and_files_move_to_the_device_of_the_factors_in_both_directions(self):
        nets, (cpu, gpu) = self.pair_of_optimizers()
        gpu.load_state_dict(cpu.state_dict())
        self.assertTrue(same_state(cpu, gpu))
        self.steps(nets[1], gpu, 2)
        self.assertEqual(gpu.state_of("0.default.weight")["a"]["momentum"].device.type, "cuda")
        with tempfile.TemporaryDirectory() as folder:
            path = folder + "/optimizer.pt"
            gpu.save(path)
            torch.save(gpu.state_dict(), folder + "/state.pt")
            state = torch.load(folder + "/state.pt", weights_only=True)
            for load in (
                lambda other: other.load_state_dict(gpu.state_dict()),
                lambda other: other.load_state_dict(state),
                lambda other: other.load(path),
                lambda other: other.load_matching(path),
                lambda other: other.load_matching(gpu.state_dict()),
            ):
                net = toy.model()
                other = LoraRite(net, lr=1e-2)
                load(other)
                self.assertTrue(same_state(gpu, other))
                self.steps(net, other, 1)
                self.assertEqual(other.state_of("0.default.weight")["a"]["momentum"].device.type, "cpu")

    def test_a_gpu_steps_as_a_cpu(self):
        nets, optimizers = self.pair_of_optimizers()
        self.steps(nets[1], optimizers[1], 3)
        for one, two in zip(*(toy.trained(net).values() for net in nets)):
            torch.testing.assert_close(one, two.cpu(), rtol=1e-4, atol=1e-5)
        self.assertEqual([p.skipped_steps for p in optimizers[1].diagnostics()], [0, 0])


if __name__ == "__main__":
    unittest.main()
