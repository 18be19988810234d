"""Grades what students hand in: the teacher's own tests on a copy of the project with their files.

Every exercise of every student runs in a process of its own, in a temporary folder, with limits on
time, memory and the size of files, so code that hangs, crashes or prints without end costs only
itself. Only the eight files are taken from a student; tests and data are the teacher's. What stays
possible: the process has the rights of the user who grades, so malicious code could read or write
that user's files, or forge its own result. If you do not trust your students, grade in a container
or as a user without rights.
"""

import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.exercise import EXERCISES, ROOT, TASK, copy, restore

EIGHT = "model tokenizer sft dpo selftrain decode calculator run".split()
SECONDS = 60  # for one exercise; on an idle core the slowest grader takes 7
MEMORY = 8 * 2**30  # bytes of addresses
FILE_SIZE = 64 * 2**20  # bytes of one file, such as what a test prints


@dataclass
class Grade:
    student: str
    exercise: int
    passed: int
    of: int
    first_failure: str


def handed_in(folder: Path) -> dict[str, Path]:
    """The student's files: in the folder itself, or in the only folder in it that has any."""
    for place in [folder, *sorted(path for path in folder.glob("*/") if not path.is_symlink())]:
        names = [f"{name}.py" for name in EIGHT] + [TASK]
        found = {name: place / name for name in names}
        found = {n: path for n, path in found.items() if path.is_file() and not path.is_symlink()}
        if found:
            return found
    return {}


def limit() -> None:
    """In the student's process: no endless memory or files. Windows has no such limits."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run_tests(work: Path, options: str, seconds: float) -> tuple[int, int, str]:
    """Run pytest in a folder -> tests passed, tests in all, the first failure in one line."""
    report = work / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", *shlex.split(options)]
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(work), "TMPDIR": str(work)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if os.name == "nt":
        environment = dict(os.environ)
    with open(work / "output.txt", "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=limit if os.name != "nt" else None,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return 0, 0, f"not finished after {seconds:.0f} seconds"
        finally:
            stop(process)
    try:
        suite = ElementTree.parse(report).getroot().find("testsuite")
        cases = suite.findall("testcase")
    except (OSError, ElementTree.ParseError, AttributeError):
        said = (work / "output.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return 0, 0, f"ended before the tests did: {lines[-1] if lines else 'nothing printed'}"
    passed = of = 0
    first = ""
    for case in cases:
        fault = case.find("failure") if case.find("failure") is not None else case.find("error")
        if case.find("skipped") is not None:
            continue
        of += 1
        passed += fault is None
        if fault is not None and not first:
            first = f"{case.get('name')}: {reason(fault)}"
    return passed, of, first


def reason(fault: ElementTree.Element) -> str:
    """Why a test failed, or why its file could not be imported."""
    message = fault.get("message", "")
    if message != "collection failure":
        return message
    errors = re.findall(r"^E +(\S.*)$", fault.text or "", re.M)
    return errors[-1] if errors else message


def stop(process: subprocess.Popen) -> None:
    """Kill a process and all that it has started."""
    if os.name == "nt":
        process.kill()
    else:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def in_one_line(text: str, width: int = 160) -> str:
    text = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return text if len(text) <= width else text[: width - 3] + "..."


def grade_one(student: Path, number: int) -> Grade:
    """Grade one exercise of one student."""
    exercise = EXERCISES[number - 1]
    files = handed_in(student)
    if exercise.file not in files:
        return Grade(student.name, number, 0, 0, f"{exercise.file} is not there")
    with tempfile.TemporaryDirectory(prefix="grade-") as place:
        work = Path(place) / "copy"
        copy(work)
        for name, path in files.items():
            if name.endswith(".py"):
                shutil.copyfile(path, work / name)
        for other, task in enumerate(EXERCISES, 1):
            if other != number and task.empty and task.file in files:
                restore(work / task.file, ROOT / task.file, task.empty, other)
        passed, of, first = run_tests(work, exercise.tests, SECONDS)
    return Grade(student.name, number, passed, of, in_one_line(first))


def exercises_of(student: Path) -> list[int]:
    """The exercises that the student's EXERCISE.md names."""
    path = handed_in(student).get(TASK)
    if path is None:
        return []
    text = path.read_text(encoding="utf-8", errors="replace")[: 10**6]
    return [int(number) for number in re.findall(r"^# Exercise ([0-9]{1,2}):", text, re.M)]


def grade_folder(folder: Path, numbers: Sequence[int]) -> None:
    """Grade all students in a folder; print a table, and write grades.csv. Raises ValueError."""
    graded = [number for number, exercise in enumerate(EXERCISES, 1) if exercise.empty]
    for number in numbers:
        if number not in graded:
            raise ValueError(f"exercise {number} is open: no test can grade it")
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give one that holds a folder for each student")
    jobs = []
    grades = []
    for student in sorted(path for path in folder.iterdir() if path.is_dir()):
        asked = numbers or [number for number in exercises_of(student) if number in graded]
        jobs += [(student, number) for number in asked]
        if not asked:
            missing = f"no {TASK} names an exercise: give its number before --grade"
            grades.append(Grade(student.name, 0, 0, 0, missing))
            print_grade(grades[-1])
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        for grade in pool.map(lambda job: grade_one(*job), jobs):
            grades.append(grade)
            print_grade(grade)
    path = folder / "grades.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["student", "exercise", "passed", "of", "first failure"])
        for grade in grades:
            formula = grade.student[0] in "=+-@"  # a spreadsheet would compute it
            student = f"'{grade.student}" if formula else grade.student
            writer.writerow([student, *list(vars(grade).values())[1:]])
    solved = sum(grade.of > 0 and grade.passed == grade.of for grade in grades)
    print(f"{solved} of {len(grades)} solved; the table is also in {path}")


def print_grade(grade: Grade) -> None:
    passed = f"{grade.passed} of {grade.of}"
    print(f"{grade.student:24}  {grade.exercise:2}  {passed:9}  {grade.first_failure}", flush=True)
