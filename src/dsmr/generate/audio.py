"""Render MIDI files as audio with FluidSynth and a General MIDI sound font, if both are installed."""

import os
import shutil
import subprocess
from pathlib import Path

from dsmr import UserError

PROGRAM = "fluidsynth"
FONT_VARIABLE = "DSMR_SOUND_FONT"
FOLDERS = (
    "/usr/share/sounds/sf2",
    "/usr/share/sounds/sf3",
    "/usr/share/soundfonts",
    "/usr/local/share/soundfonts",
    "/opt/homebrew/share/soundfonts",
    "~/Library/Audio/Sounds/Banks",
    "C:/soundfonts",
)
SUFFIXES = (".sf2", ".sf3")
INSTALL = (
    "Debian and Ubuntu: apt install fluidsynth fluid-soundfont-gm; Fedora: dnf install fluidsynth fluid-soundfont-gm; "
    "macOS: brew install fluid-synth"
)


def find_sound_font(given: str | None = None) -> Path:
    """Return the given font, that of `$DSMR_SOUND_FONT`, or the largest one in the usual folders."""
    named = given or os.environ.get(FONT_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise UserError(f"sound font {named}: no such file")
        return path
    folders = [Path(folder).expanduser() for folder in FOLDERS]
    found = [p for folder in folders if folder.is_dir() for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES]
    if not found:
        raise UserError(f"no General MIDI sound font found; set {FONT_VARIABLE} to one, or install it ({INSTALL})")
    return max(found, key=lambda path: path.stat().st_size)


def check_audio(sound_font: str | None = None) -> Path:
    """Return the sound font to use; raises `UserError` if FluidSynth or a font is missing, before any work is done."""
    if shutil.which(PROGRAM) is None:
        raise UserError(f"audio needs the program {PROGRAM}, which is not installed ({INSTALL})")
    return find_sound_font(sound_font)


def render_audio(midi: Path, audio: Path, sound_font: Path) -> None:
    """Render a MIDI file as a WAV file, 44.1 kHz stereo; raises `UserError` if FluidSynth fails."""
    partial = audio.with_name(f".{audio.name}.partial")
    command = [PROGRAM, "-ni", "-q", "-g", "0.6", "-r", "44100", "-T", "wav", "-F", str(partial)]
    try:
        done = subprocess.run([*command, str(sound_font), str(midi)], capture_output=True, text=True, check=False)
        if done.returncode or not partial.is_file() or not partial.stat().st_size:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(f"{PROGRAM} could not write {audio}: {said[-1] if said else 'no message'}")
        partial.replace(audio)
    finally:
        partial.unlink(missing_ok=True)
