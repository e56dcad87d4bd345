#!/usr/bin/env python3
"""The study's plan: which runs it asks for, given the results so far. No program is called: losses are made up."""

import math
import pathlib
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench/quality"))

import grid
import programs
import study
import tables


def run_all(plan: study.Study, loss, most: int = 10000) -> list[grid.Job]:
    """Does what the plan asks for until it asks for nothing; `loss(job, seed)` makes up a result."""
    done = []
    while jobs := plan.plan():
        job = jobs[0]
        done.append(job)
        assert len(done) < most, "the plan does not end"
        for key, seed in zip(job.keys(), job.seeds):
            plan.runs[key] = {"test_loss": loss(job, seed), "test_accuracy": 0.5}
    return done


def small_study() -> study.Study:
    plan = study.Study([], "quick")
    plan.grid = [(grid.Cell("correlated"), "adam")]
    return plan


def valley(best: float):
    """A loss with its minimum at a rate, on a logarithmic scale."""
    return lambda job, seed: math.exp(abs(math.log10(job.lr / best)))


class Search(unittest.TestCase):
    def rates(self, jobs: list[grid.Job], split: str) -> list[float]:
        return sorted({job.lr for job in jobs if job.split == split})

    def test_a_best_rate_inside_the_grid_is_refined_and_tested(self):
        jobs = run_all(small_study(), valley(1e-2))
        self.assertEqual(self.rates(jobs, "validation"), [1e-3, 3.2e-3, 5.6e-3, 1e-2, 1.8e-2, 3.2e-2, 1e-1])
        self.assertEqual(self.rates(jobs, "test"), [1e-2])

    def test_the_refinement_can_win(self):
        self.assertEqual(self.rates(run_all(small_study(), valley(1.8e-2)), "test"), [1.8e-2])

    def test_the_grid_grows_while_the_best_rate_lies_at_its_edge(self):
        for best in (1e-4, 1.0):
            jobs = run_all(small_study(), valley(best))
            self.assertEqual(self.rates(jobs, "test"), [best])
            searched = self.rates(jobs, "validation")
            self.assertLess(searched[0], best)
            self.assertGreater(searched[-1], best)

    def test_a_loss_that_falls_for_ever_ends_the_search(self):
        run_all(small_study(), lambda job, seed: 1 / job.lr, most=40)
        run_all(small_study(), lambda job, seed: job.lr, most=40)

    def test_a_diverged_run_is_the_worst(self):
        def loss(job, seed):
            return None if job.lr > 5e-3 else valley(1e-2)(job, seed)

        self.assertLess(self.rates(run_all(small_study(), loss), "test")[0], 5e-3)

    def test_test_data_and_seeds_are_not_those_of_the_search(self):
        for task in grid.TASKS.values():
            self.assertFalse(set(task.search_seeds) & set(task.test_seeds))
            self.assertGreaterEqual(len(task.test_seeds), 3 if task.model == "smollm2" else 5)

    def test_a_task_with_lower_rates_begins_its_search_there(self):
        plan = study.Study([], "quick")
        plan.grid = [(grid.Cell("kinds"), "adam")]
        jobs = run_all(plan, valley(1e-3))
        self.assertEqual(self.rates(jobs, "validation"), [1e-4, 3.2e-4, 5.6e-4, 1e-3, 1.8e-3, 3.2e-3, 1e-2])

    def test_a_study_goes_on_where_it_stopped(self):
        whole = run_all(small_study(), valley(1e-2))
        half = small_study()
        for job in whole[: len(whole) // 2]:
            for key in job.keys():
                half.runs[key] = {"test_loss": valley(1e-2)(job, 0), "test_accuracy": 0.5}
        self.assertEqual(len(run_all(half, valley(1e-2))), len(whole) - len(whole) // 2)

    def test_over_the_ranks_the_middle_ranks_best_rate_is_tried_at_every_rank(self):
        plan = study.Study([], "ranks")
        plan.grid = [(grid.Cell("correlated", rank), "adam") for rank in (4, 16, 64)]

        def loss(job, seed):
            return valley(1.8e-2 if job.cell.rank == grid.MIDDLE_RANK else 1e-3)(job, seed)

        jobs = run_all(plan, loss)
        for rank in (4, 16, 64):
            of_rank = [job for job in jobs if job.cell.rank == rank]
            self.assertIn(1.8e-2, self.rates(of_rank, "validation"))
            self.assertEqual(self.rates(of_rank, "test"), [1.8e-2 if rank == 16 else 1e-3])

    def test_every_grid_names_known_tasks_and_contenders(self):
        for name in grid.GRIDS:
            for cell, contender in study.Study([], name).grid:
                self.assertIn(cell.task, grid.TASKS)
                self.assertIn(contender, grid.CONTENDERS)

    def test_a_line_that_a_crash_cut_short_is_left_out(self):
        path = pathlib.Path(self.id() + ".jsonl")
        self.addCleanup(path.unlink)
        path.write_text('{"lr": 1}\n{"lr": 2}\n{"lr": 3, "se', encoding="utf-8")
        self.assertEqual([run["lr"] for run in study.read_runs(path)], [1, 2])

    def test_packed_runs_are_read_and_new_ones_come_behind_them(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "runs.jsonl"
            for first, runs in ((1, '{"lr": 1}\n{"lr": 2}\n'), (3, '{"lr": 3}\n')):
                path.write_text(runs, encoding="utf-8")
                study.pack(path)
                self.assertEqual([run["lr"] for run in study.read_runs(path)], [1, 2, 3][: max(first, 2)])
            self.assertEqual([file.name for file in path.parent.iterdir()], ["runs.jsonl.xz"])
            path.write_text('{"lr": 4}\n', encoding="utf-8")
            self.assertEqual([run["lr"] for run in study.read_runs(path)], [1, 2, 3, 4])


class Report(unittest.TestCase):
    def test_the_table_over_the_ranks_has_the_best_loss_and_that_at_the_middle_ranks_rate(self):
        def entry(losses: dict[float, float]) -> tables.Entry:
            runs = [
                {"split": "validation", "lr": lr, "seed": seed, "test_loss": loss}
                for lr, loss in losses.items()
                for seed in (0, 1)
            ]
            return tables.Entry("correlated", runs)

        of_rank = {4: {1e-3: 0.5, 1e-2: 0.25}, 16: {1e-3: 0.2, 1e-2: 0.3}, 64: {1e-2: 0.75, 1e-3: 4.0}}
        cells = {("correlated", rank, "usual"): {"adam": entry(losses)} for rank, losses in of_rank.items()}
        self.assertEqual(
            tables.rank_table(cells, "correlated").splitlines()[2].split(" | ")[1:],
            ["0.25 at 1.0e-02, 0.5", "0.2 at 1.0e-03, 0.2", "0.75 at 1.0e-02, 4 |"],
        )
        del cells["correlated", 64, "usual"]
        self.assertEqual(tables.rank_table(cells, "correlated"), "")


class Texts(unittest.TestCase):
    def test_records_are_drawn_once_and_for_all_and_keep_their_head(self):
        source, target = pathlib.Path(self.id() + ".all"), pathlib.Path(self.id() + ".jsonl")
        self.addCleanup(source.unlink)
        self.addCleanup(target.unlink)
        source.write_text("head\n" + "".join(f"{number}\n" for number in range(100)), encoding="utf-8")

        programs.sample_records(source, target, 10)
        drawn = target.read_text(encoding="utf-8").splitlines()
        programs.sample_records(source, target, 10)
        self.assertEqual(target.read_text(encoding="utf-8").splitlines(), drawn)
        self.assertEqual((drawn[0], len(set(drawn[1:]))), ("head", 10))
        self.assertNotEqual(drawn[1:], [str(number) for number in range(10)])

        programs.sample_records(source, target, 0)
        self.assertEqual(target.read_bytes(), source.read_bytes())

    def test_scores_are_those_of_the_last_measurement(self):
        lines = [{"loss": 3, "validation_loss": 2.5}, {"loss": 2, "validation_loss": 1.5}, {"final": True}]
        self.assertEqual(programs.Programs.text_scores(lines), {"test_loss": 1.5})
        lines[-1]["test_acc"] = 0.75
        self.assertEqual(programs.Programs.text_scores(lines), {"test_loss": 1.5, "test_accuracy": 0.75})

        lines = [{"test_accuracy": 0.9}, {"test_loss": 0.5, "test_accuracy": 0.8}]
        self.assertEqual(
            programs.Programs.sentence_scores(lines), {"test_loss": 0.5, "test_accuracy": 0.8, "best_accuracy": 0.9}
        )


if __name__ == "__main__":
    unittest.main()
