"""Whether the tests notice a mistake: small mutations of the code, each of which a test must catch.

    python tests/mutations.py [NAME ...]

A mutation replaces one piece of the source, found by its text, by another. The checkout is copied as it is in
the working tree. The tests of all mutations run once in the unmutated copy, where they must pass. Then they
run for each mutation in the mutated copy, where one must fail. NAME is a part of a mutation's name; without
one all run, which takes about ten minutes on one core. The exit code is 1 if a mutation is not caught, if
the unmutated tests fail, or if a piece of text is not in the source exactly once; 2 for an unknown NAME.

It shows that the tests catch these mutations. It does not show that they catch others.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 300  # seconds for the tests of one mutation


class Mutation(NamedTuple):
    """A change that breaks the code.

    Attributes:
        name: what is broken then.
        tests: arguments of pytest, with blanks between them; files are named without their folder.
        old: source text that is there once in all files of the package.
        new: what takes its place.
    """

    name: str
    tests: str
    old: str
    new: str


MUTATIONS = (
    # Dual numbers and attention
    Mutation("GELU's tangent lacks the input's tangent", "test_dual.py::test_tangent_is_the_jvp",
        "return value, first * tangent, first, second", "return value, first, first, second"),
    Mutation("GELU's backward drops the tangent's part",
        "test_dual.py::test_gradients_through_value_and_tangent",
        "torch.addcmul(first * value, second_tangent, tangent)", "first * value"),
    Mutation("a product's tangent lacks one of two parts", "test_dual.py::test_tangent_is_the_jvp",
        "torch.addcmul(x.tangent * y.value, x.value, y.tangent)", "x.tangent * y.value"),
    Mutation("RMS norm's tangent keeps its part along the value", "test_dual.py::test_tangent_is_the_jvp",
        "torch.addcmul(x_tangent, y, along, value=-1).mul_(inverse_rms)", "x_tangent * inverse_rms"),
    Mutation("RMS norm's backward lacks a term", "test_dual.py::test_gradients_through_value_and_tangent",
        ".addcmul_(on_x_tangent, along, value=-1)", ""),
    Mutation("layer norm does not subtract the mean", "test_dual.py::test_tangent_is_the_jvp",
        "return x - x.mean(-1, keepdim=True)", "return x"),
    Mutation("the tangent of softmax does not subtract its mean", "test_dual.py::test_tangent_is_the_jvp",
        "(probabilities * (scores_tangent - mean)) @ v.value", "(probabilities * scores_tangent) @ v.value"),
    Mutation("a causal query sees the key after it",
        "test_attention.py::test_value_and_tangent_are_those_of_the_jvp",
        "dtype=torch.bool, device=scores.device).tril()", "dtype=torch.bool, device=scores.device).tril(1)"),
    Mutation("the kernel's tangent ignores its running mean", "test_attention_kernels.py::test_every_absence",
        "W = W - shift[:, None] * U", "W = W"),
    Mutation("the kernel's key gradients lack a term", "test_attention_kernels.py::test_every_absence",
        "A += S_dot * B", "A += 0.0 * B"),
    Mutation("the kernel's query gradients lack a term", "test_attention_kernels.py::test_every_absence",
        "dQ = product(dS_dot, K_dot, dQ)", "dQ = dQ"),
    # Flow map and objectives
    Mutation("the displacement has the opposite sign", "test_flow_map.py::test_flow_map_of_a_known_network",
        "return per_sample(s - t, x) * self._scale", "return per_sample(t - s, x) * self._scale"),
    Mutation("the terminal velocity lacks its derivative",
        "test_flow_map.py::test_flow_map_of_a_known_network",
        "self._scale(value + duration * tangent, condition)", "self._scale(value, condition)"),
    Mutation("gradients pass through the target", "test_flow_map.py::test_target_never_receives_gradient",
        "with torch.no_grad():\n        end_velocity", "with torch.enable_grad():\n        end_velocity"),
    Mutation("the network is its own target", "test_flow_map.py::test_loss_sample_by_sample",
        "end_velocity = frozen.velocity(", "end_velocity = online.velocity("),
    Mutation("guidance has a wrong sign", "test_flow_map.py::test_loss_sample_by_sample",
        "w * guided_velocity + (1 - w) * unconditional_velocity",
        "w * guided_velocity + (w - 1) * unconditional_velocity"),
    Mutation("the loss is divided by w, not its square", "test_flow_map.py::test_loss_sample_by_sample",
        "terminal / condition.guidance_weight**2, flow", "terminal / condition.guidance_weight, flow"),
    Mutation("flow matching's target has a wrong sign", "test_flow_map.py::test_flow_matching_by_its_formula",
        "(velocity - (noise - x0))", "(velocity - (x0 - noise))"),
    Mutation("s is not truncated by t", "test_times.py::test_marginal_distributions_of_t_and_s",
        "probability.log() + torch.special.log_ndtr(bound)", "probability.log()"),
    Mutation("guidance weights are uniform, not their inverses",
        "test_training.py::test_dropped_labels_and_guidance_weights",
        '1 / high + draws.uniform("guidance weight", rows) * (1 / low - 1 / high)',
        '1 / (low + draws.uniform("guidance weight", rows) * (high - low))'),
    Mutation("a dropped label keeps its guidance weight",
        "test_training.py::test_dropped_labels_and_guidance_weights",
        "weight = torch.where(dropped, 1.0, weight)", "weight = weight.clone()"),
    Mutation("labels are never dropped", "test_training.py::test_dropped_labels_and_guidance_weights",
        "labels = torch.where(dropped, null_label, labels)", "labels = labels.clone()"),
    # Networks
    Mutation("modulation is not normalised",
        "test_network_design.py::test_normalised_modulation_bounds_activations",
        "vectors = dual.rms_norm(vectors)", "vectors = dual.linear_map(torch.clone, vectors)"),
    Mutation("queries and keys are not normalised", "test_reference.py::test_network_and_flow_map",
        "both = dual.rms_norm(both, scale=Dual(scales))", "both = dual.multiply(both, Dual(scales))"),
    Mutation("the time embedding's frequencies are denser", "test_reference.py::test_network_and_flow_map",
        "-math.log(10_000) / self.frequency_count)", "-math.log(10_000) / (self.frequency_count - 1))"),
    Mutation("the network sees s in place of t - s", "test_network_design.py::test_condition_by_the_parts",
        "self.duration(dual.subtract(t, s))", "self.duration(s)"),
    Mutation("spectral initialisation squares the norm",
        "test_network_design.py::test_spectral_normalisation",
        "torch.linalg.eigvalsh(gram)[-1].sqrt()", "torch.linalg.eigvalsh(gram)[-1]"),
    Mutation("the head does not start at zero", "test_network_design.py::test_output_is_zero_at_the_start",
        "zeroed=[*modulation, self.head],", "zeroed=modulation,"),
    # Training and random numbers
    Mutation("the moving average takes the rate for its complement",
        "test_training.py::test_averages_follow_their_recursion",
        "torch._foreach_lerp_(averages, current, 1 - rate)", "torch._foreach_lerp_(averages, current, rate)"),
    Mutation("a resumed run has no moments of AdamW", "test_resume.py::test_stopped_and_resumed",
        "torch.empty_like(parameter).copy_(tensor)", "torch.zeros_like(parameter)"),
    Mutation("a resumed run reads the first batches again", "test_resume.py::test_stopped_and_resumed",
        "self._read(range(self.state.step, last), received)",
        "self._read(range(last - self.state.step), received)"),
    Mutation("all parts of a batch weigh alike", "test_training.py::test_parts_weigh_by_their_rows",
        "(min(rows, count - start) / count)", "(rows / count)"),
    Mutation("all blocks of rows draw the same numbers", "test_seeds.py::test_numbers_may_be_large",
        "= 0, 0, number, word", "= 0, 0, 0, word"),
    Mutation("rows are those from a block's start on", "test_seeds.py::test_rows_are_the_same_in_every_range",
        "slice(first - start, last - start)", "slice(0, last - first)"),
    # Data
    Mutation("every epoch has the same order", "test_data.py::test_epochs_and_seeds_have_different_orders",
        'generator(seed, "order", epoch)', 'generator(seed, "order")'),
    Mutation("classes are numbered in reverse", "test_folders.py::test_the_first_folder_is_the_class",
        "tuple(sorted(set(filter(None, classes))))",
        "tuple(sorted(set(filter(None, classes)), reverse=True))"),
    Mutation("an image has the label of the one before",
        "test_data_images.py::test_an_epoch_holds_every_image_once_with_its_label",
        "[numbers[name] for name in classes]", "[numbers[name] for name in classes[-1:] + classes[:-1]]"),
    Mutation("the corner of an image is kept",
        "test_data_images.py::test_only_the_centre_of_an_oblong_image_is_kept",
        "(width - inner_width) // 2, (height - inner_height) // 2", "0, 0"),
    Mutation("resizing picks pixels",
        "test_data_images.py::test_shrinking_averages_instead_of_picking_pixels",
        "image.resize((width, height), Image.Resampling.BICUBIC)",
        "image.resize((width, height), Image.Resampling.NEAREST)"),
    Mutation("normalisation keeps the mean", "test_data.py::test_normalisation_is_per_channel_and_inverts",
        "return (data - self._per_channel(self.mean, data)) /", "return data /"),
    Mutation("latents are posteriors' means",
        "test_encode.py::test_draws_have_the_posterior_s_mean_and_deviation",
        'self.mean + self.std * draws.normal("posterior", rows, self.mean.shape[1:])', "self.mean"),
    Mutation("latents' spread lacks the posteriors'",
        "test_encode.py::test_statistics_are_those_of_all_latents_at_once",
        ".square().sum(1) + std.square().sum(1)", ".square().sum(1)"),
    # Figures and theory
    Mutation("the covariance is divided by n", "test_evaluation.py::TestFrechet",
        "centred.div_((len(features) - 1) ** 0.5)", "centred.div_(len(features) ** 0.5)"),
    Mutation("a covariance's factor lacks the square root", "test_evaluation.py::TestFrechet",
        "eigenvectors[:, kept] * eigenvalues[kept].sqrt()", "eigenvectors[:, kept] * eigenvalues[kept]"),
    Mutation("the nearest neighbour counts, not the k-th", "test_evaluation_features.py::TestPrecisionRecall",
        "radii.append(nearest[:, -1])", "radii.append(nearest[:, 0])"),
    Mutation("a vector is its own neighbour", "test_evaluation_features.py::TestPrecisionRecall",
        "distances.fill_diagonal_(torch.inf)", "pass"),
    Mutation("the Inception Score lacks the entropy", "test_evaluation_features.py::TestInceptionScore",
        ".mean() - torch.xlogy(marginal, marginal).sum()", ".mean()"),
    Mutation("the Wasserstein distance is squared", "test_evaluation.py::TestWasserstein",
        "float(np.sqrt(max(0.0, squared)))", "float(max(0.0, squared))"),
    Mutation("the exact flow has a wrong velocity", "test_theory.py::test_flow_map_solves_the_equation",
        "* (2 - start - end)", "* (1 - start - end)"),
    Mutation("the bound's amplification is not squared", "test_theory.py::test_the_tight_form_is_sharp",
        "weight = 2 * t * amplification.square()", "weight = 2 * t * amplification"),
    # Sampling
    Mutation("the grid of times has a wrong spacing", "test_sampling.py::test_uniform_grid",
        "1 - i / steps for i in range(steps)", "1 - i / (steps + 1) for i in range(steps)"),
    Mutation("sampling ignores the guidance weight", "test_sampling.py::test_guidance_reaches_the_network",
        "guidance_weight=x.new_full((len(x),), guidance_weight)", "guidance_weight=None"),
    Mutation("all batches of samples have the same noise",
        "test_trained_model.py::test_samples_do_not_depend_on_the_batch_size",
        "range(first + start, first + stop)", "range(first, first + stop - start)"),
    # Commands, files, processes and other formats
    Mutation("a user's mistake ends with exit code 1", "test_bad_input.py::test_one_line_and_nothing_changed",
        "except InputError as error:\n        return _fail(error, str(error), 2)",
        "except InputError as error:\n        return _fail(error, str(error), 1)"),
    Mutation("an error does not name the option",
        "test_errors.py::test_another_subject_or_a_place_leaves_the_message",
        "return type(self)(subject, self.message)", "return type(self)(self.subject, self.message)"),
    Mutation("options of earlier versions are unknown", "test_config.py::test_pairs_and_nothing",
        're.sub(r"^--times(?=[.=]|$)", "--objective.times", argument)', "argument"),
    Mutation("a pickle may name anything", "test_pickles.py::test_names_are_inert",
        "STAND_INS.get((module, name)) or inert_class(name)", "super().find_class(module, name)"),
    Mutation("a file is written in its place", "test_evaluation.py::TestReport",
        "yield unfinished\n            os.replace(unfinished, path)", "yield path"),
    Mutation("a second writer gets the lock", "test_locks.py::test_a_lock_belongs_to_one",
        "fcntl.LOCK_SH if shared else fcntl.LOCK_EX", "fcntl.LOCK_SH"),
    Mutation("a rank may be the number of processes", "test_encode.py::test_variables_of_another_launcher",
        "int(rank) < int(count)):", "int(rank) <= int(count)):"),
    Mutation("two processes do the same work",
        "test_evaluation_features.py::test_processes_share_all_parts_in_order",
        "self.rank * each + min(self.rank, more)", "self.rank * each"),
    Mutation("the authors' time embeddings are exchanged", "test_reference.py::test_network_and_flow_map",
        '(("time", "t"), ("duration", "s"),', '(("time", "s"), ("duration", "t"),'),
    Mutation("a SiT's velocity keeps its sign", "test_sit.py::test_the_first_velocity_is_the_teachers",
        '"final_layer.linear.weight": -weight,', '"final_layer.linear.weight": weight,'),
    Mutation("a pipeline ignores the guidance scale",
        "test_pipeline.py::test_pixels_are_those_of_the_trained_model",
        "jump(flow_map, x, t, s, condition, weight)", "jump(flow_map, x, t, s, condition)"),
)  # fmt: skip


def main(names: list[str]) -> int:
    """Apply the mutations that are asked for, one after the other."""
    chosen = [m for m in MUTATIONS if not names or any(name in m.name for name in names)]
    unknown = [name for name in names if not any(name in m.name for m in MUTATIONS)]
    if unknown:
        print(f"no mutation is called {', '.join(unknown)}; there are:", file=sys.stderr)
        print(*(m.name for m in MUTATIONS), sep="\n", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        copy_checkout(checkout)
        source = {path: path.read_text(encoding="utf-8") for path in (checkout / "src").rglob("*.py")}
        problems = [problem for m in MUTATIONS for problem in problems_of(m, source.values())]
        if problems:
            print(*problems, sep="\n", file=sys.stderr)
            return 1
        print(f"the tests of {len(chosen)} mutations, unmutated", flush=True)
        code, output = run_tests(checkout, dict.fromkeys(test for m in chosen for test in m.tests.split()))
        if code:
            print(f"{output}\nthe unmutated tests fail", file=sys.stderr)
            return 1
        caught = sum([is_caught(m, checkout, source) for m in chosen])
    print(f"{caught} of {len(chosen)} mutations are caught")
    return int(caught < len(chosen))


def copy_checkout(to: Path) -> None:
    """The files that git tracks or does not ignore, as they are in the working tree."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, dict.fromkeys(names)):
        if (ROOT / name).is_file():  # one that git tracks may be removed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def problems_of(mutation: Mutation, texts: Iterable[str]) -> list[str]:
    """Why a mutation cannot be applied."""
    found = sum(text.count(mutation.old) for text in texts)
    problems = [] if found == 1 else [f"is in the source {found} times, not once: {mutation.old!r}"]
    if mutation.old == mutation.new:
        problems.append("changes nothing")
    return [f"{mutation.name}: {problem}" for problem in problems]


def is_caught(mutation: Mutation, checkout: Path, source: dict[Path, str]) -> bool:
    """Run the tests of a mutation on the mutated copy, print what came of it, and restore the copy."""
    path, text = next((path, text) for path, text in source.items() if mutation.old in text)
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    begun = time.perf_counter()
    code, output = run_tests(checkout, mutation.tests.split(), "-x")
    seconds = time.perf_counter() - begun
    path.write_text(text, encoding="utf-8")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    caught = code == 1 and failed is not None  # other codes: no test was run
    why = f"caught by {failed[1]}" if caught and failed else f"NOT CAUGHT, exit code {code} of pytest"
    print(f"{mutation.name}: {why} ({seconds:.0f} s)", flush=True)
    if code not in (0, 1, None):
        print(output, file=sys.stderr)
    return caught


def run_tests(checkout: Path, tests: Iterable[str], *options: str) -> tuple[int | None, str]:
    """The exit code of pytest, None if it takes too long, and what it printed."""
    files = {path.name: str(path.relative_to(checkout)) for path in (checkout / "tests").rglob("test_*.py")}
    places = [test.partition("::") for test in tests]
    arguments = [files.get(name, name) + separator + rest for name, separator, rest in places]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *arguments],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LONGEST if options else None)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # what the tests have started as well
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return None, output
    return process.returncode, output


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
