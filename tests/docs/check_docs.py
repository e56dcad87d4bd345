"""Compiles the C++ of README.md and docs/*.md, and compares the README's program with examples/quickstart.cpp.

    check_docs.py REPOSITORY WORK_DIRECTORY -- COMPILE_COMMAND...

Conventions for a writer of documents:
- A ```cpp block with `int main` is a whole program and compiles as it stands.
- Any other ```cpp block is the inside of a function, with lora_rite.hpp and torch.h included; `#include` lines in it
  are fine. What it takes for granted (a model, a loss) stands before it in a comment that readers do not see:
      <!-- given: torch::nn::Linear model(8, 8); -->
- Code that is not to be compiled is ```text.
"""

import pathlib
import re
import subprocess
import sys

BLOCK = re.compile(
    r"(?:^<!-- given:(?P<given>(?:(?!-->).)*)-->\n\s*)?^```cpp\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(document: pathlib.Path):
    """Every C++ block of a document: its first line's number, what is given, the code."""
    text = document.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield text.count("\n", 0, found.start("code")) + 1, (found["given"] or "").strip(), found["code"]


def snippets_source(snippets) -> str:
    """One translation unit for all snippets, since LibTorch's headers cost more than they do; #line points home."""
    includes = ["#include <lora_rite/lora_rite.hpp>", "#include <torch/torch.h>"]
    functions = []
    for number, (document, line, given, code) in enumerate(snippets):
        body = code.split("\n")
        for i, text in enumerate(body):
            if text.startswith("#include"):
                includes.append(text)
                body[i] = ""
        functions.append(
            f'void block_{number}();\nvoid block_{number}() {{\n{given}\n#line {line} "{document}"\n'
            + "\n".join(body)
            + "}\n"
        )
    return "\n".join(includes + functions)


def main() -> int:
    root, work = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    compile_command = sys.argv[sys.argv.index("--") + 1 :]
    # A snippet that ends with a result need not use it.
    lenient = ["-Wno-unused-variable", "-Wno-unused-but-set-variable", "-Wno-unused-parameter"]
    work.mkdir(parents=True, exist_ok=True)

    quickstart, quickstart_shown = (root / "examples/quickstart.cpp").read_text(encoding="utf-8"), False
    sources, snippets = {}, []
    documents = [root / "README.md", *sorted((root / "docs").glob("**/*.md"))]
    for document in documents:
        for line, given, code in blocks(document):
            if "int main" in code:
                if code == quickstart:  # compiled as an example
                    quickstart_shown |= document == documents[0]
                    continue
                sources[f"program_{len(sources)}"] = f'#line {line} "{document}"\n{code}'
            else:
                snippets.append((document, line, given, code))
    if snippets:
        sources["snippets"] = snippets_source(snippets)

    failed = False
    for name, source in sources.items():
        path = work / f"{name}.cpp"
        path.write_text(source, encoding="utf-8")
        result = subprocess.run([*compile_command, *lenient, str(path), "-o", str(work / f"{name}.o")])
        failed |= result.returncode != 0
    if not quickstart_shown:
        print("README.md: no ```cpp block equals examples/quickstart.cpp", file=sys.stderr)
        failed = True
    print(f"{len(documents)} documents, {len(snippets)} snippets, {len(sources) - bool(snippets)} programs")
    return failed


if __name__ == "__main__":
    sys.exit(main())
