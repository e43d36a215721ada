"""A miniature music corpus: about 53 minutes of small pieces, composed by this script from a seed.

Six styles (waltz, song, canon, study, chorale, jig), each a composing function below, go through all 24
major and minor keys, tempi of 60 to 160 beats per minute, and 2/4, 3/4, 4/4 and 6/8 time. The script
writes each piece as a MIDI file, fluidsynth plays it, and it is stored as 24 kHz mono Ogg Opus in
music/train and music/val. Validation pieces share no melody and no whole chord sequence with the
training pieces.

    apt-get install --no-install-recommends fluidsynth fluid-soundfont-gm
    python assets/make_music.py            # about three minutes; writes assets/music/{train,val}/*.ogg
    python assets/make_music.py --more 128 --out corpora/large/music       # 128 minutes more to train on

Needs numpy, soundfile and soxr. The soundfont is FluidR3 GM by Frank Wen, MIT licence (see
/usr/share/doc/fluid-soundfont-gm/copyright). The same seed gives the same music; only the random stream
number that every Ogg file carries differs between two runs.
"""
import argparse, itertools, math, random, shutil, struct, subprocess, sys, tempfile
from pathlib import Path
import numpy as np, soundfile, soxr

MINUTES = {"train": 42.5, "val": 9.3}  # a split is complete once it is at least this long
RATE = 24000
SOUNDFONTS = ["/usr/share/sounds/sf2/FluidR3_GM.sf2", "/usr/share/sounds/sf3/FluidR3_GM.sf3"]

# Time is counted in quarter notes. Metre: (length of a bar, distance between strong beats, length of a beat)
METRES = {"2/4": (2, 2, 1), "3/4": (3, 3, 1), "4/4": (4, 2, 1), "6/8": (3, 1.5, 1.5)}
RHYTHMS = {  # one bar of melody
    "2/4": [(1, 1), (.5, .5, 1), (1, .5, .5), (.5, .5, .5, .5), (1.5, .5), (.5, .25, .25, 1)],
    "3/4": [(1, 1, 1), (2, 1), (1.5, .5, 1), (1, .5, .5, 1), (.5, .5, 1, 1), (1, 1, .5, .5), (.5,) * 6],
    "4/4": [(1, 1, 1, 1), (2, 1, 1), (1.5, .5, 1, 1), (.5, .5, 1, .5, .5, 1), (1, .5, .5, 2),
            (1.5, .5, 1.5, .5), (.5, .5, .5, .5, 1, 1), (1, 1, .5, .5, .5, .5), (.5, 1, .5, 1, 1)],
    "6/8": [(.5,) * 6, (1, .5, 1, .5), (.5, .5, .5, 1, .5), (1, .5, .5, .5, .5), (.75, .25, .5, 1, .5)]}
FORMS = {2: "ab", 3: "aab", 4: "abab", 5: "abcab", 6: "abcdab", 7: "ababcab", 8: "ababcdab"}  # 4-bar phrases

# General MIDI program: (name, octaves above written pitch)
GM = {0: ("grand piano", 0), 4: ("electric piano", 0), 6: ("harpsichord", 0), 9: ("glockenspiel", 1),
      10: ("music box", 1), 11: ("vibraphone", 0), 12: ("marimba", 0), 16: ("drawbar organ", 0),
      19: ("church organ", 0), 21: ("accordion", 0), 24: ("nylon guitar", 0), 25: ("steel guitar", 0),
      32: ("acoustic bass", 0), 33: ("fingered bass", 0), 40: ("violin", 0), 41: ("viola", 0),
      42: ("cello", 0), 45: ("pizzicato strings", 0), 46: ("harp", 0), 48: ("string ensemble", 0),
      52: ("choir", 0), 56: ("trumpet", 0), 60: ("french horn", 0), 65: ("alto saxophone", 0),
      68: ("oboe", 0), 70: ("bassoon", 0), 71: ("clarinet", 0), 73: ("flute", 1), 74: ("recorder", 1)}
LEADS = (0, 9, 11, 21, 40, 56, 65, 68, 71, 73, 74)
CHORDS = (0, 4, 6, 12, 16, 24, 25, 46)
BASSES = (32, 33, 42, 45, 70)
PLUCKED = (0, 4, 6, 10, 11, 12, 24, 25, 46)
ENSEMBLES = [(19,) * 4, (48,) * 4, (52,) * 4, (40, 41, 41, 42), (73, 71, 60, 70), (56, 60, 60, 70)]

# Scale degrees count from 0 (tonic); a triad is named by the degree of its root: 0 is I, 4 is V.
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
NEXT = {0: (1, 2, 3, 3, 4, 5, 5), 1: (4, 4, 6), 2: (3, 5), 3: (0, 1, 4, 4), 4: (0, 0, 5),
        5: (1, 3, 3, 4), 6: (0,)}  # functional harmony: tonic -> predominant -> dominant -> tonic


class Piece:
    """Notes (channel, start, length, pitch, velocity) of one piece, with its key, metre and tempo."""

    def __init__(self, rng, tonic, minor, metre, tempo):
        self.rng, self.tonic, self.minor, self.metre = rng, tonic, minor, metre
        self.bar, self.strong, self.beat = METRES[metre]
        self.quarter = 60 / rng.uniform(*tempo) / self.beat  # seconds
        self.notes, self.programs = [], []
        self.lines, self.chords = set(), []  # melodies relative to their first note; all chords: `main` compares both
        self.phrases = min(8, max(2, int(rng.uniform(27, 37) / (4 * self.bar * self.quarter))))
        self.last = (4 * self.phrases - 1) * self.bar  # where the last bar begins

    def instrument(self, choices):
        self.programs.append(self.rng.choice(choices))
        return len(self.programs) - 1  # its channel

    def pitch(self, degree, chord):
        """MIDI pitch of a scale degree. In minor the dominant (V, vii) takes the raised 6th and 7th."""
        octave, step = divmod(degree, 7)
        raised = self.minor and chord in (4, 6) and step in (5, 6)
        return self.tonic + 12 * octave + (MINOR if self.minor else MAJOR)[step] + raised

    def bass(self, chord, third=False):
        """Bass note of a chord: its root, but diminished triads are in first inversion."""
        inverted = third or chord == 6 or (self.minor and chord == 1)
        return 38 + (self.pitch(chord + 2 * inverted, chord) - 38) % 12

    def add(self, channel, start, length, pitch, velocity):
        """Add a note, with a swell over each four bars, an accent on the first beat, and a human touch."""
        velocity *= .9 + .18 * math.sin(math.pi * (start / (4 * self.bar) % 1))
        velocity += 6 * (start % self.bar == 0) + self.rng.gauss(0, 3)
        start = max(0, start + self.rng.gauss(0, .007) / self.quarter)
        pitch += 0 if channel == 9 else 12 * GM[self.programs[channel]][1]
        self.notes.append((channel, start, length, pitch, round(min(120, max(25, velocity)))))


def progression(rng, length, closed, start=0):
    """Chords that lead to an authentic cadence (V I) if closed, or to a half cadence (... V) if not."""
    while True:
        chords = [start]
        while len(chords) < length:
            chords.append(rng.choice(NEXT[chords[-1]]))
        if chords[-2:] == [4, 0] if closed else chords[-1] == 4:
            return chords


def triad(chord, centre):
    """The inversion of a triad, in close position, that is nearest to a centre, so that voices hardly move."""
    spots = [chord + tone + 7 * octave for octave in range(-4, 3) for tone in (0, 2, 4)]
    return min(zip(spots, spots[1:], spots[2:]), key=lambda three: abs(three[1] - centre))


def motif(p):
    """One bar of rhythm and contour: [(length, move in scale steps), ...], mostly steps in one direction."""
    way, moves = p.rng.choice((-1, 1)), []
    for length in p.rng.choice(RHYTHMS[p.metre]):
        way = -way if p.rng.random() < .25 else way
        moves.append((length, way * p.rng.choice((1, 1, 1, 2))))
    return moves


def melody(p, chords, motifs, low, high, cadence=True, against=()):
    """A melody [(start, length, degree, chord)]: chord tones on strong beats, passing notes between them."""
    def attempt():
        line, passing = [], 0
        degree = p.rng.choice([d for d in range(low + 2, high - 1) if (d - chords[0]) % 7 in (0, 2, 4)])
        for bar, chord in enumerate(chords):
            time, last = 0, cadence and bar == len(chords) - 1
            for length, move in [(p.bar * .8, 0)] if last else p.rng.choice(motifs[bar % 2:]):
                goal = degree + move if low <= degree + move <= high else degree - move
                if time % p.strong == 0:  # the nearest chord tone; a dissonance resolves by step
                    wanted = (0,) if last and chord == 0 else (0, 2, 4)
                    reach = 1 if passing and not last else 4
                    near = range(degree - reach, degree + reach + 1)
                    tones = [d for d in near if (d - chord) % 7 in wanted]
                    degree, passing = min(tones, key=lambda d: (abs(d - goal), abs(d - degree))), 0
                else:
                    if passing or (goal - chord) % 7 not in (0, 2, 4):
                        goal = degree + (passing or (1 if goal > degree else -1))
                    passing = 0 if (goal - chord) % 7 in (0, 2, 4) else (1 if goal > degree else -1)
                    degree = goal
                line.append((bar * p.bar + time, length, degree, chord))
                time += length
        return line

    def faults(line):
        """Repeated notes, turning on the spot, leaving the range, a leap into the cadence, parallels."""
        pairs, other = list(zip(line, line[1:])), {note[0]: note[2] for note in against}
        count = sum(a[2] == b[2] for a, b in pairs) + abs(line[-1][2] - line[-2][2])
        count += sum(a[2] == b[2] for a, b in zip(line, line[2:])) / 2
        count += 2 * sum(not low <= note[2] <= high for note in line)
        return count + 4 * sum(a[2] != b[2] and (a[2] - other[a[0]]) % 7 == (b[2] - other[b[0]]) % 7 in (0, 4)
                               for a, b in pairs if a[0] in other and b[0] in other)

    line = min((attempt() for _ in range(16)), key=faults)
    p.lines.add(tuple((start, degree - line[0][2]) for start, _, degree, _ in line))
    return line


def ornament(p, line):
    """Vary a repeated phrase: a leap of a third is filled with a passing note."""
    varied = []
    for (start, length, degree, chord), after in zip(line, line[1:] + line[-1:]):
        if length >= 1 and abs(after[2] - degree) == 2 and p.rng.random() < .6:
            varied += [(start, length / 2, degree, chord),
                       (start + length / 2, length / 2, (degree + after[2]) // 2, chord)]
        else:
            varied.append((start, length, degree, chord))
    return varied


def lead(p, channel, at, line, velocity):
    for start, length, degree, chord in line:
        p.add(channel, at + start, length * .95, p.pitch(degree, chord), velocity)


def theme(p, channel, velocity, low=-1, high=9, slow=False):
    """Play four-bar phrases, if slow only their strong beats, in a form such as a b c d a b. Yield every bar to be
    accompanied (time, label of its phrase, number in it, chord), which is all but the last: see `final`."""
    made, motifs = {}, {}
    for number, label in enumerate(FORMS[p.phrases]):
        if label in made:
            chords, line = made[label]
            line = ornament(p, line)
        else:  # antecedent and consequent (a b, c d) share their motifs; the middle part leaves the tonic
            pair = motifs.setdefault(label in "cd", [motif(p), motif(p)])
            chords = progression(p.rng, 4, label in "bd", p.rng.choice((3, 5)) if label in "cd" else 0)
            line = melody(p, chords, pair, low, high)
            made[label] = chords, line
        p.chords += chords
        at = number * 4 * p.bar
        lead(p, channel, at, [note for note in line if not slow or note[0] % p.strong == 0], velocity)
        for bar, chord in enumerate(chords):
            if at + bar * p.bar < p.last:
                yield at + bar * p.bar, label, bar, chord


def final(p, channel, velocity):
    """The last bar: the tonic triad, held, over its root."""
    for pitch in [p.bass(0)] + [p.pitch(degree, 0) for degree in triad(0, -3)]:
        p.add(channel, p.last, p.bar, pitch, velocity)


def waltz(p):
    """Melody over a bass note on beat one and chords on beats two and three."""
    top, chordal, low = p.instrument(LEADS), p.instrument(CHORDS), p.instrument(BASSES)
    for time, _, bar, chord in theme(p, top, 92):
        p.add(low, time, 1.4, p.bass(chord, bar == 1 and p.rng.random() < .4), 82)
        for beat in (1, 2):
            for degree in triad(chord, -2):
                p.add(chordal, time + beat, .6, p.pitch(degree, chord), 62)
    final(p, chordal, 66)
    p.add(low, p.last, 1.4, p.bass(0), 82)


def song(p):
    """A tune with strummed chords, a bass of roots and fifths, and drums (silent in the first phrase)."""
    top, chordal, low = p.instrument(LEADS), p.instrument(CHORDS), p.instrument(BASSES[:2])
    strum = p.rng.choice([(0, 1, 2, 3), (0, 1, 1.5, 2.5, 3), (0, .5, 1.5, 2, 3, 3.5), (0, 1.5, 2, 3.5)])
    kick = p.rng.choice([(0, 2), (0, 2.5), (0, 1.5, 2), (0, 2, 3.5)])
    hat, snare = p.rng.choice([(42, 38), (51, 37), (42, 37), (51, 38)]), (1, 3)
    for time, label, _, chord in theme(p, top, 94):
        for beat in strum:
            for number, degree in enumerate(triad(chord, -2)):  # a strum: strings a moment apart
                p.add(chordal, time + beat + number * .02, .7, p.pitch(degree, chord), 60)
        for beat, degree in ((0, chord), (1.5, chord), (2, chord + 4), (3, chord + 2)):
            if beat in (0, 2) or label in "bd":
                p.add(low, time + beat, .9, 33 + (p.pitch(degree, chord) - 33) % 12, 86)
        if time >= 16:
            drums = [(beat, 36, 88) for beat in kick] + [(beat, hat[1], 76) for beat in snare]
            for beat, drum, velocity in drums + [(half / 2, hat[0], 50) for half in range(8)]:
                p.add(9, time + beat, .2, drum, velocity)
    final(p, chordal, 64)
    p.add(low, p.last, 3.5, p.bass(0), 84)
    p.add(9, p.last, 1, 36, 80)


def canon(p):
    """Over a ground bass a leader plays new phrases; a second voice plays each of them one phrase later."""
    leader, follower = p.instrument(LEADS), p.instrument(LEADS[2:] + (41, 46, 60))
    ground, low = progression(p.rng, 4, False), p.instrument(BASSES + (19,))
    span, pair, before = 4 * p.bar, [motif(p), motif(p), motif(p)], []
    statements = int(32 / (span * p.quarter))
    for number in range(statements):
        line = melody(p, ground, pair, 0, 10, cadence=False, against=before)
        lead(p, leader, number * span, line, 86)
        lead(p, follower, number * span, before, 80)
        before = line
        p.chords += ground
        for bar, chord in enumerate(ground):
            p.add(low, number * span + bar * p.bar, p.bar * .95, p.bass(chord), 70)
    end = statements * span
    for channel, pitch in ((leader, p.pitch(7, 0)), (follower, p.pitch(2, 0)), (low, p.bass(0))):
        p.add(channel, end, p.bar * 1.5, pitch, 76)
    p.chords.append(0)


def study(p):
    """Broken chords in an even pattern under a slow upper line, for one plucked or struck instrument."""
    hand, step = p.instrument(PLUCKED), .25 if p.quarter > .7 and p.metre != "6/8" else .5
    shapes = [(0, 1, 2), (0, 2, 1), (0, 1, 2, 1), (0, 2, 1, 2), (0, 1, 2, 3, 2, 1)]
    figures = p.rng.sample(shapes, 2)
    for time, label, _, chord in theme(p, hand, 86, 4, 11, slow=True):
        p.add(hand, time, p.bar, p.bass(chord), 76)
        tones, figure = triad(chord, -1), figures[label in "cd"]
        played = [(tones + (tones[0] + 7,))[figure[n % len(figure)]] for n in range(round(p.bar / step))]
        for number, degree in enumerate(played):
            p.add(hand, time + number * step, step * 1.8, p.pitch(degree, chord), 60)
    final(p, hand, 66)


def chorale(p):
    """Four voices, a chord on each beat. The voicing with the least motion and fewest faults is taken."""
    ensemble = p.rng.choice(ENSEMBLES)
    channels = [p.instrument([program]) for program in ensemble]  # soprano, alto, tenor, bass
    beats, voices, slots = 2 * p.bar, None, []
    count = int(34 / (beats * p.quarter))
    for number in range(count):  # two-bar phrases that end on a long chord
        chords = progression(p.rng, beats - 1, closed=number % 2 == 1 or number == count - 1)
        p.chords += chords
        slots += [(number * beats + n, 2 if n == beats - 2 else 1, chord) for n, chord in enumerate(chords)]

    def cost(new, old, chord, last):
        leading, moves = (p.tonic - 1) % 12, [b - a for a, b in zip(old, new)]
        parallel = sum(moves[i] != 0 and (old[i] - old[j]) % 12 == (new[i] - new[j]) % 12 in (0, 7)
                       for i, j in itertools.combinations(range(4), 2))
        doubled = sum(pitch % 12 == leading for pitch in new) > 1
        unresolved = chord == 0 and any(a % 12 == leading and b - a != 1 for a, b in zip(old[:1], new))
        return (sum(map(abs, moves[:3])) + abs(moves[3]) / 2 + 40 * parallel + 30 * doubled + 20 * unresolved
                + 3 * (moves[0] == 0) + abs(new[0] - 70) / 2 + 30 * (last and new[0] % 12 != p.tonic % 12)
                + p.rng.random() * 3)

    sung = []
    for start, length, chord in slots:
        tones = {p.pitch(chord + tone, chord) % 12 for tone in (0, 2, 4)}
        soprano, alto, tenor = ([n for n in range(a, b) if n % 12 in tones] for a, b in
                                ((60, 80), (55, 73), (48, 68)))
        third = chord in (0, 3) and length == 1 and start > 0 and p.rng.random() < .3  # I6, IV6
        low = [p.bass(chord, third) + octave for octave in (0, 12)]
        choices = [v for v in itertools.product(soprano, alto, tenor, low)  # complete, uncrossed, close
                   if v[0] > v[1] > v[2] > v[3] and v[0] - v[1] <= 12 and v[1] - v[2] <= 12
                   and {n % 12 for n in v} == tones]
        old = voices or (70, 64, 57, 46)
        voices = min(choices, key=lambda v: cost(v, old, chord, start == slots[-1][0]))
        sung.append((start, length, voices, chord))
    p.lines.add(tuple((start, voices[0] - sung[0][2][0]) for start, _, voices, _ in sung))
    for (start, length, voices, chord), after in zip(sung, sung[1:] + sung[-1:]):
        scale, filled = [p.pitch(d, chord) for d in range(-21, 21)], False
        for voice, channel in enumerate(channels):
            here, there = voices[voice], after[2][voice]
            between = [n for n in scale if min(here, there) < n < max(here, there)]
            split = not filled and len(between) == 1 and abs(there - here) in (3, 4) and p.rng.random() < .5
            p.add(channel, start, length / (1 + split) * .97, here, 84 - 6 * (voice in (1, 2)))
            if split:  # one voice at a time fills a third with a passing note
                p.add(channel, start + length / 2, length / 2, between[0], 74)
                filled = True


def jig(p):
    """A dance in 6/8: running melody, bass on the two beats, chords on the off-beats, a hand drum."""
    top, chordal, low = p.instrument(LEADS[1:]), p.instrument(CHORDS), p.instrument(BASSES)
    drum = p.rng.random() < .6
    for time, _, _, chord in theme(p, top, 94):
        for half in (0, 1.5):
            fifth = 38 + (p.pitch(chord + 4, chord) - 38) % 12
            p.add(low, time + half, 1, fifth if half and chord != 6 else p.bass(chord), 82)
            for degree in triad(chord, -2):
                p.add(chordal, time + half + 1, .4, p.pitch(degree, chord), 60)
            for eighth in range(3 if drum and time >= 12 else 0):  # silent in the first phrase
                p.add(9, time + half + eighth / 2, .2, 64 if eighth == 0 else 63, (74, 46, 58)[eighth])
    final(p, chordal, 66)


STYLES = {waltz: (["3/4"], (96, 160)), song: (["4/4"], (84, 144)), canon: (["2/4", "3/4"], (60, 108)),
          study: (["3/4", "4/4", "6/8"], (60, 120)), chorale: (["3/4", "4/4"], (60, 92)),
          jig: (["6/8"], (66, 120))}


def compose(name, style, tonic, minor):
    """One piece; its name seeds its random numbers."""
    rng = random.Random(name)
    metres, tempo = STYLES[style]
    p = Piece(rng, tonic, minor, rng.choice(metres), tempo)
    style(p)
    return p


def midi_bytes(p, ticks=480):
    """A Standard MIDI File (format 0): header chunk, then one track of (time since last event, event)."""
    end = max(start + length for _, start, length, _, _ in p.notes)
    last = max(start for _, start, *_ in p.notes) - p.bar
    events = [(0, bytes([0xC0 | channel, program])) for channel, program in enumerate(p.programs)]
    for beat, slower in ((0, 1), (last, 1.06), (last + p.bar / 2, 1.14)):  # a ritardando at the end
        events.append((beat, b"\xff\x51\x03" + round(p.quarter * slower * 1e6).to_bytes(3, "big")))
    for channel, start, length, pitch, velocity in p.notes:
        events.append((start, bytes([0x90 | channel, pitch, velocity])))
        events.append((start + length, bytes([0x80 | channel, pitch, 0])))
    events.append((end + 2.5 / p.quarter, b"\xff\x2f\x00"))  # end of track, after the sound has died away

    def variable_length(number):  # seven bits a byte, the high bit set on all but the last
        out = [number & 127]
        while number := number >> 7:
            out.insert(0, number & 127 | 128)
        return bytes(out)

    # Within one instant, sorting puts notes (0x80, 0x90) before programs (0xC0), so notes at beat 0 are a piano's.
    # The music that ships was made so, and stays so: the codec and the models were trained on it.
    track, now = b"", 0
    for time, event in sorted((round(max(0, beat) * ticks), event) for beat, event in events):
        track += variable_length(time - now) + event
        now = time
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, ticks)
    return header + struct.pack(">4sI", b"MTrk", len(track)) + track


def render(p, soundfont, folder):
    """Play the piece with fluidsynth: 24 kHz mono samples, trimmed, faded out, at a random level."""
    (folder / "piece.mid").write_bytes(midi_bytes(p))
    subprocess.run(["fluidsynth", "-ni", "-q", "-g", "0.5", "-r", "48000", "-O", "float", "-F",
                    folder / "piece.wav", soundfont, folder / "piece.mid"],
                   check=True, stdout=subprocess.DEVNULL)
    audio, rate = soundfile.read(folder / "piece.wav", dtype="float32")
    audio = soxr.resample(audio.mean(axis=1), rate, RATE)
    loud = np.flatnonzero(np.abs(audio) > .003 * np.abs(audio).max())
    audio = audio[max(0, loud[0] - RATE // 20):loud[-1] + RATE // 5]
    audio[-RATE // 2:] *= np.linspace(1, 0, RATE // 2)
    return audio * p.rng.uniform(.45, .8) / np.abs(audio).max()


def main():
    parser = argparse.ArgumentParser(description="Compose and render the music corpus.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "music",
                        help="folder whose train/ and val/ are replaced (default: %(default)s)")
    parser.add_argument("--more", type=float, default=0, help="minutes of further training music (default: none)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.more >= 0:
        parser.error("--more must be 0 or more")
    soundfont = next((path for path in SOUNDFONTS if Path(path).exists()), None)
    if not shutil.which("fluidsynth") or not soundfont:
        sys.exit("make_music.py needs: apt-get install --no-install-recommends fluidsynth fluid-soundfont-gm")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    stages = [*MINUTES.items(), *([("train", args.more)] if args.more else [])]
    number, taken, train_programs = 0, {"train": set(), "val": set()}, set()
    # everything is rendered beside its destination and moved there at the end: no half-made corpus
    with tempfile.TemporaryDirectory(prefix=".music-", dir=args.out.resolve().parent) as folder:
        work = Path(folder)
        for split, minutes in stages:
            (work / split).mkdir(exist_ok=True)
            seconds, pieces, programs, size = 0, 0, set(), 0
            while seconds < 60 * minutes:
                if pieces % 24 == 0:  # every key comes once in 24 pieces
                    keys = list(itertools.product(range(55, 67), (False, True)))
                    random.Random(f"{args.seed} {split} {pieces}").shuffle(keys)
                style = list(STYLES)[pieces % len(STYLES)]
                # again if a phrase occurs in the other split, or validation would have an instrument of its own
                for attempt in itertools.count():
                    p = compose(f"{args.seed} {split} {number} {attempt}", style, *keys[pieces % 24])
                    marks = p.lines | {("chords", *p.chords)}
                    heard = taken["val" if split == "train" else "train"]
                    if not (marks & heard or split == "val" and set(p.programs) - train_programs):
                        break
                number, pieces = number + 1, pieces + 1
                audio = render(p, soundfont, work)
                path = work / split / f"{style.__name__}-{number:03d}.ogg"
                soundfile.write(path, audio, RATE, format="OGG", subtype="OPUS",
                                compression_level=.92)  # libsndfile's scale: about 27 kbit/s
                taken[split] |= marks
                if split == "train":
                    train_programs |= set(p.programs)
                programs |= set(p.programs)
                seconds, size = seconds + len(audio) / RATE, size + path.stat().st_size
            print(f"{split}: {pieces} pieces, {seconds / 60:.1f} minutes, {size:,} bytes, {len(programs)} "
                  f"instruments and drums: {', '.join(GM[n][0] for n in sorted(programs))}", flush=True)
        args.out.mkdir(exist_ok=True)
        for split in MINUTES:
            shutil.rmtree(args.out / split, ignore_errors=True)
            (work / split).replace(args.out / split)


if __name__ == "__main__":
    main()
