"""Build the demo corpus: documentation sources under permissive licences, a document for each file.

Sources, each downloaded beforehand into one folder with its registry's ordinary client
(exact commands in data/README.md):

- Debian 12 packages (`apt-get download NAME`), see `DEBIAN`;
- the Django source archive (`pip download --no-deps --no-binary :all: django==4.2.16`).

Run as `python data/build_corpus.py DOWNLOADS`; needs `dpkg-deb` and `tar`.
"""

import argparse
import hashlib
import logging
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

log = logging.getLogger("build_corpus")

# name in the `source` column -> Debian package that holds its documentation sources
DEBIAN = {
    "python": "python3.11-doc",
    "sqlalchemy": "python-sqlalchemy-doc",
    "pandas": "python-pandas-doc",
    "sklearn": "python-sklearn-doc",
    "pytest": "python-pytest-doc",
    "sphinx": "sphinx-doc",
    "twisted": "twisted-doc",
    "flask": "python-flask-doc",
    "werkzeug": "python-werkzeug-doc",
    "jinja2": "python-jinja2-doc",
    "sympy": "python-sympy-doc",
}
MIN_CHARS = 1000  # shorter files are mostly generated stubs: a heading and one directive
MAX_SHARED = 0.5  # a file with a larger share of lines from earlier files is a near duplicate
VALIDATION_PERCENT = 5
# generated indexes and gallery stubs, lists of changes (ticket numbers, names), licence texts
SKIP = re.compile(
    r"/(generated|auto_examples|reference/api|_static|themes?|changelog|whatsnew|whats_new|releases?)/"
    r"|/(changelog|changes|news|license|copyright|authors|announce)|/historic/",
    re.IGNORECASE,
)
TEXT_SOURCE = re.compile(
    r"(_sources/.*\.(rst|md|txt)\.txt|_sources/[^.]*\.txt|/rst/.*\.rst)(\.gz)?$"
)


def debian_documents(package: Path, scratch: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the documentation sources in a package, unpacked into `scratch`."""
    subprocess.run(["dpkg-deb", "--extract", package, scratch], check=True)
    for path in sorted(scratch.rglob("*")):
        name = path.relative_to(scratch).as_posix()
        if path.is_symlink() or not path.is_file() or not TEXT_SOURCE.search(name):
            continue
        parts = re.split(r"/_sources/|/rst/", name, maxsplit=1)
        yield parts[-1].removesuffix(".txt"), path.read_text(errors="replace")


def django_documents(archive: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the documentation sources in Django's source archive."""
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda m: m.name):
            name = member.name.partition("/")[2]
            if member.isfile() and name.startswith("docs/") and name.endswith(".txt"):
                text = files.extractfile(member).read().decode("utf-8", errors="replace")
                yield name.removeprefix("docs/"), text


def read_documents(downloads: Path) -> Iterator[tuple[str, str]]:
    """Yield (`source/name`, text) of every file, in a fixed order."""
    for source, package in DEBIAN.items():
        (deb,) = downloads.glob(f"{package}_*.deb")
        with tempfile.TemporaryDirectory() as scratch:
            for name, text in debian_documents(deb, Path(scratch)):
                yield f"{source}/{name}", text
    (archive,) = downloads.glob("[Dd]jango-*.tar.gz")
    for name, text in django_documents(archive):
        yield f"django/{name}", text


def clean(text: str) -> str:
    """The text with plain line ends, no tabs, and at most two empty lines in a row."""
    text = text.replace("\r\n", "\n").replace("\ufeff", "").replace("\t", "    ")
    text = re.sub(r"[ ]+\n", "\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


def share_of_seen_lines_(text: str, seen: set[str]) -> float:
    """Share of the long lines that are in `seen`, to which all lines are added."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 20]
    share = sum(line in seen for line in lines) / max(len(lines), 1)
    seen.update(lines)
    return share


def filter_documents(pairs: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Drop tiny, generated and (nearly) duplicate documents."""
    seen: set[str] = set()
    for name, raw in pairs:
        text = clean(raw)
        if len(text) < MIN_CHARS or SKIP.search("/" + name) or "\ufffd" in text:
            continue
        if share_of_seen_lines_(text, seen) <= MAX_SHARED:
            yield name, text


def is_held_out(name: str) -> bool:
    """Whether a document is in the validation split; its name alone decides, in every build."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < VALIDATION_PERCENT


def write_parquet(rows: list[tuple[str, str]], path: Path) -> None:
    table = pa.table({"text": [t for _, t in rows], "source": [n for n, _ in rows]})
    pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=False)
    chars = sum(len(text) for _, text in rows)
    size = path.stat().st_size
    log.info("%s: %d documents, %.2f M characters, %d bytes", path, len(rows), chars / 1e6, size)


def log_sources(rows: list[tuple[str, str]]) -> None:
    for source in (*DEBIAN, "django"):
        texts = [text for name, text in rows if name.startswith(f"{source}/")]
        log.info("%-12s %5d documents %6.2f M", source, len(texts), sum(map(len, texts)) / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("downloads", type=Path, help="folder with the downloaded packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "corpus")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = list(filter_documents(read_documents(options.downloads)))
    log_sources(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    write_parquet([row for row in rows if not is_held_out(row[0])], options.out / "train.parquet")
    write_parquet([row for row in rows if is_held_out(row[0])], options.out / "validation.parquet")


if __name__ == "__main__":
    main()
