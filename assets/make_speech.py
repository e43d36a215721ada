"""
A miniature speech corpus: sentences from a small grammar, read aloud by free text-to-speech engines.

    apt-get install --no-install-recommends flite espeak-ng festival festvox-us-slt-hts festvox-kdlpc16k
    python assets/make_speech.py              # writes assets/speech/{train,val}/<voice>-<number>.ogg
    python assets/make_speech.py --more 561 --out corpora/large/speech        # 561 clips more to train on

Every clip is one voice speaking a short passage on one topic. No sentence occurs twice anywhere. The
last two words of every list (but "bucket", which is in two lists) and the last template of every topic
are reserved for validation, so val is not only a reshuffle of train. The same seed gives the same audio
(only the stream number in the Ogg header may differ).

Licences, as stated in /usr/share/doc/<package>/copyright:
    flite (engine; voices rms, awb, kal16, slt)   CMU, BSD-like: use, copy, modify, distribute, sell freely
    festival (engine)                             University of Edinburgh, BSD-like, same terms
    festvox-us-slt-hts (voice slt)                CMU "EST" licence and BSD-3-clause, same terms
    festvox-kdlpc16k (voice ked)                  University of Edinburgh, BSD-like, same terms
    espeak-ng (engine and voices)                 GPL-3+; by its section 2 output is covered only
                                                  if it is itself a covered work
The sentences were written for this project.
"""
import argparse, os, random, re, shutil, subprocess, sys, tempfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import soundfile as sf
import soxr

RATE = 24000                             # of the corpus
CLIPS = {"train": 187, "val": 39}
KBPS = 25                                # Opus

# name: (engine, the engine's voice, playback speed, clips per round). Playing a voice a little faster or
# slower moves its pitch and formants together, which makes a new speaker out of an old one.
VOICES = {
    "slt":   ("festival", "cmu_us_slt_arctic_hts", 1.00, 2),  # woman, the widest band (32 kHz)
    "alto":  ("festival", "cmu_us_slt_arctic_hts", 0.86, 2),  # a deeper woman
    "rms":   ("flite", "rms", 1.00, 2),                       # man
    "awb":   ("flite", "awb", 1.00, 2),                       # man, Scottish
    "wren":  ("flite", "slt", 1.12, 2),                       # a younger woman
    "theo":  ("flite", "rms", 1.17, 1),                       # a younger man
    "kal":   ("flite", "kal16", 1.00, 1),                     # man, diphones
    "ked":   ("festival", "ked_diphone", 1.00, 1),            # man, diphones
    "annie": ("espeak-ng", "en-us+Annie", 0.95, 1),           # woman, formants
    "alice": ("espeak-ng", "en-gb-x-rp+f2", 1.00, 1),         # woman, formants, British
    "mike":  ("espeak-ng", "en-gb-scotland+m3", 1.04, 1),     # man, formants, Scottish
}
PACKAGES = {"flite": "flite", "festival": "festival festvox-us-slt-hts festvox-kdlpc16k",
            "espeak-ng": "espeak-ng"}

# ---- what is said: word lists and, per topic, templates separated by bars ----------------------------------

WORDS = {key: words.split(", ") for key, words in {
    "she": "Martha, Olivia, Joan, Beth, Grace, Ruth, Alice, Zoe, Priya, Helen, Maya, Judith, Rosa, Faye, "
           "Nora, Charlotte, Sheila, Vera, Ingrid, Yvonne",
    "he": "Arthur, George, Hugo, Victor, Samuel, Jack, Oscar, Peter, Boris, Walter, Ravi, Leo, Frank, Toby, "
          "Martin, Charlie, Nathan, Jasper, Vaughan",
    "kin": "my uncle, our neighbour, the baker, her cousin, his brother, the teacher, our doctor, my "
           "grandmother, the postman, the young nurse, the captain, the old farmer, my boss, a stranger, my "
           "sister, the gardener, the plumber, our choirmaster",
    "food": "fresh bread, tomato soup, rice pudding, roast chicken, fried fish, apple pie, mushroom stew, "
            "bean curry, lemon cake, boiled ham, vegetable broth, cheese on toast, cold pasta, pumpkin pie, "
            "smoked salmon, rhubarb crumble",
    "ingr": "salt, pepper, butter, sugar, honey, garlic, flour, milk, olive oil, vinegar, cream, parsley, "
            "mustard, ginger, chopped onion, lemon juice, nutmeg, yoghurt",
    "drink": "coffee, green tea, orange juice, hot chocolate, cold water, lemonade, warm milk, cider, apple "
             "juice, mint tea, soda water, ginger beer, buttermilk",
    "pot": "bowl, pan, jug, plate, mug, pot, jar, tray, kettle, teapot, dish, cup, bucket, saucepan",
    "n": "two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, fourteen, fifteen, sixteen, "
         "twenty, thirty, thirteen, nineteen",
    "big": "sixty, seventy five, ninety, two hundred, three thousand, forty eight, eighty seven, five "
           "hundred, twelve hundred, twenty six, thirty nine, six hundred and four, fifty three, nine "
           "thousand, one hundred and eleven",
    "clock": "half past six, quarter to nine, ten past three, noon, five o'clock, twenty to eight, "
             "midnight, seven fifteen, ten thirty, one o'clock, quarter past four, five to two, eleven "
             "o'clock, half past twelve, six forty five",
    "day": "Monday, Tuesday, Wednesday, Saturday, Sunday, Thursday, Friday",
    "month": "January, February, March, April, May, June, July, September, November, December, August, "
             "October",
    "season": "spring, summer, the dry season, autumn, winter",
    "colour": "red, blue, green, yellow, black, white, brown, grey, pink, golden, silver, purple, scarlet",
    "garment": "coat, scarf, jumper, hat, shirt, jacket, belt, glove, dress, sock, raincoat, cardigan, bow "
               "tie",
    "thing": "lamp, clock, ladder, basket, pillow, mirror, candle, blanket, suitcase, hammer, bucket, "
             "brush, parcel, radio, rug, chair, torch, vase, wheelbarrow, telescope",
    "room": "kitchen, attic, hall, bedroom, cellar, garage, bathroom, study, porch, shed, nursery, pantry",
    "place": "library, station, market, bakery, museum, harbour, post office, swimming pool, chemist, town "
             "hall, theatre, bank, park, school, cathedral, lighthouse",
    "city": "Paris, London, Boston, Rome, Dublin, Cairo, Tokyo, Chicago, Oslo, Madrid, Sydney, Vienna, "
            "Glasgow, Lisbon, Toronto, Zurich, Havana",
    "ride": "bus, train, ferry, tram, taxi, coach, plane, boat, van, shuttle, night express",
    "beast": "fox, badger, heron, deer, squirrel, hedgehog, owl, mouse, frog, goose, lizard, rabbit, otter, "
             "wolf, kingfisher, weasel",
    "pet": "cat, puppy, parrot, hamster, kitten, rabbit, terrier, spaniel, tortoise, greyhound",
    "crop": "roses, tulips, beans, carrots, peas, lilies, onions, herbs, sunflowers, potatoes, daisies, "
            "radishes, pumpkins, strawberries, marigolds, turnips",
    "tree": "oak, birch, willow, pine, maple, apple tree, cherry tree, beech, chestnut, hawthorn, yew",
    "horn": "piano, violin, guitar, flute, trumpet, drum, cello, harp, accordion, saxophone, oboe, tuba",
    "wet": "rain, fog, snow, sleet, frost, drizzle, hail, mist, heavy showers, thunder, low cloud",
    "sky": "cold, windy, foggy, mild, humid, cloudy, sunny, stormy, dry, icy, chilly, frosty, overcast",
    "mood": "happy, tired, nervous, proud, cheerful, cross, calm, hungry, lonely, excited, puzzled, sleepy, "
            "thoughtful, jealous",
    "how": "slowly, quietly, quickly, gently, softly, carefully, calmly, silently, neatly, smoothly, "
           "lazily, awkwardly, cautiously",
    "metal": "copper, iron, gold, tin, zinc, silver, lead, steel, nickel, aluminium, platinum",
    "planet": "Mars, Venus, Jupiter, Saturn, Mercury, Neptune, Uranus",
    "job": "carpenter, pilot, judge, dentist, painter, chemist, tailor, singer, lawyer, farmer, journalist, "
           "cook, librarian, surgeon, goldsmith",
    "game": "tennis, chess, football, hockey, cricket, golf, rugby, basketball, bowls, squash, badminton",
    "study": "history, physics, music, Latin, geography, drawing, biology, French, grammar, algebra, "
             "philosophy",
    "ship": "fishing boat, yacht, old steamer, rowing boat, tug, cargo ship, canoe, schooner, barge",
    "part": "knee, shoulder, wrist, back, elbow, ankle, neck, left foot, thumb, jaw",
    "stuff": "glass, wood, paper, wool, leather, rubber, cotton, clay, plastic, stone, velvet, bamboo",
}.items()}

TOPICS = {name: [" ".join(t.split()) for t in templates.split("|")] for name, templates in {
    "kitchen": """
        Add {n} spoons of {ingr} to the {pot}. | {she} served {food} with {ingr} on top. | Could you pass me
        the {pot}, please? | There is no {ingr} left in the cupboard. | We had {food} for lunch on {day}. |
        Stir in the {ingr}, then cover the {pot}. | {he} burned the {food} again. | Who finished all the
        {drink}? | Wash the {colour} {pot} before you use it. | The smell of {food} filled the {room}. |
        {kin} always cooks with {ingr}. | I would rather have {food} than {food}. | A little {ingr} goes a
        long way. | Whisk the {ingr} until it is smooth and pale.""",
    "weather": """
        It will be {sky} on {day}. | Expect {wet} before {clock}. | Last {month} was unusually {sky}. | The
        forecast says {wet}, but {kin} doubts it. | Take a {garment}, because it looks {sky} outside. | After
        the {wet} came a bright, {sky} afternoon. | Nobody likes {wet} in {month}. | Is it always this {sky}
        in {city}? | The morning was {sky} and very still. | In {city} it was {n} degrees at {clock}. | We
        waited under the {tree} until the {wet} passed. | Thick {colour} clouds rolled over {city}. | Roads
        near {city} are closed because of {wet}.""",
    "travel": """
        The {ride} to {city} leaves at {clock}. | We missed the {ride} by {n} minutes. | {she} packed a
        {garment} and a {thing} for {city}. | How far is it from {city} to {city}? | Two tickets to {city},
        please. | My {colour} suitcase was sent to {city} by mistake. | {he} slept on the {ride} all the way
        to {city}. | Platform {n} is behind the {place}. | The {ride} was crowded, and every seat was taken.
        | They drove {big} miles to see {city}. | Does this {ride} stop at the {place}? | We stayed in {city}
        for {n} nights. | Please mind the gap when leaving the {ride}. | Our passports were stamped in {city}
        just after {clock}.""",
    "numbers": """
        {n} plus {n} is a sum I can do. | The answer was {big}, not {big}. | Chapter {n} begins on page
        {big}. | There were {big} people in the {place}. | Please call room {big} before {clock}. | Divide
        {big} by {n} and tell me the rest. | {she} counted {n} {colour} buttons on the {garment}. | The
        {thing} weighs {n} pounds. | My ticket number is {big}. | The {thing} costs {n} dollars, or {n} with
        a {pot}. | {he} is {n} years older than {she}. | Only {n} of the {big} letters were answered. |
        Multiply by {n}, subtract {n}, and you have {big}.""",
    "time": """
        The meeting starts at {clock} on {day}. | It is {clock}, and {kin} is still asleep. | The {place}
        closes at {clock}. | {she} was born in {month}, on a {day}. | I have not seen {he} since {month}. |
        Wake me at {clock}, not a minute later. | The {thing} arrived {n} days late. | We meet every {day}
        outside the {place}. | By {clock} the {place} was empty. | What are you doing next {day}? | It took
        {kin} {n} weeks to write one page. | Yesterday felt longer than all of {month}. | In {n} years nobody
        will remember that {day}.""",
    "science": """
        {metal} melts when it is hot enough. | Is {planet} larger than {planet}? | A thin wire of {metal}
        carried the current. | Sound travels faster through {metal} than through air. | {planet} rose in the
        east before dawn in {month}. | The professor weighed {n} grams of {metal}. | {she} mixed {ingr} with
        water and wrote down the result. | Neither {stuff} nor {stuff} attracts a magnet. | Plants turn
        sunlight into sugar. | From {planet}, the earth is only a dot. | The probe reached {planet} after {n}
        years. | Ice floats because it is lighter than water. | The experiment failed {n} times before it
        worked. | A bar of {metal} expands in the heat. | Under the microscope, {stuff} looked like a
        {colour} forest.""",
    "garden": """
        {he} planted {crop} beside the {tree}. | The {crop} need water twice a day. | A {beast} has eaten all
        the {crop}. | Our {crop} come up in {month}. | Leaves from the {tree} covered the lawn. | Dig a hole,
        and plant the {crop} in {n} rows. | The {colour} {crop} smell wonderful. | {kin} grows {crop} behind
        the {place}. | Why are the {crop} so small this year? | The {tree} is {big} years old. | Cut back the
        {tree} before {season}. | {she} left a {thing} among the {crop}. | Bees hummed around the {crop} from
        dawn until {clock}.""",
    "animals": """
        A {beast} ran across the road. | The {pet} sat {how} on the {colour} rug. | Did you hear the {beast}
        last night? | {she} found a young {beast} near the {place}. | Our {pet} is afraid of the {beast}. |
        Every {beast} knows its own path home. | {he} taught the {pet} to fetch a {garment}. | Feed the {pet}
        at {clock}. | The {pet} hid behind the {thing} in the {room}. | {n} crows watched the {beast} {how}.
        | The {beast} looked at us and {how} walked away. | Her {pet} is called {she}, and his is called
        {he}. | Something, perhaps a {beast}, had chewed the {garment}.""",
    "town": """
        The {place} is opposite the {place}. | Turn left at the {place}, then go straight on. | {kin} works
        at the {place} on {day}. | How much is the {colour} {garment}? | I bought a {thing} and some {ingr}.
        | The new {place} opens in {month}. | {he} sold his {thing} for {big} dollars. | They are painting
        the {place} {colour}. | This {garment} is too small for {kin}. | Is there a {place} near here? |
        {she} lost a {colour} {garment} in the {place}. | Crowds gathered {how} outside the {place}. | The
        square between the {place} and the {place} was full of pigeons.""",
    "music": """
        {she} plays the {horn} very {how}. | Can you hear a {horn}? | {he} practised the {horn} for {n}
        hours. | The song begins {how} and ends with a {horn}. | My {horn} needs a good clean and a new
        owner. | Nobody sang as {how} as {she}. | The concert at the {place} starts at {clock}. | A {horn}
        and a {horn} make a strange pair. | Please tune the {horn} before {day}. | {kin} hummed {how} while
        washing the {pot}. | The choir sang about {season} and the sea. | Somebody dropped a {horn} on the
        {colour} stage.""",
    "sea": """
        The {ship} sailed {how} past the {place}. | {n} sailors came ashore at {clock}. | High tide is at
        {clock} on {day}. | {he} painted the {ship} {colour}. | A {ship} was lost in the {wet}. | Waves broke
        {how} against the wall. | The captain of the {ship} drank {drink} every night. | We could see a
        {colour} {ship} far away. | Gulls followed the {ship} for {big} miles. | Is the {ship} leaving for
        {city} tonight? | Its cargo was {stuff}, {metal} and dried fruit. | There was nothing but {wet} and
        deep water. | Beyond the reef, a {ship} lay {how} at anchor.""",
    "home": """
        The {thing} in the {room} is broken. | Where did you put the {colour} {thing}? | {she} keeps a
        {thing} under the stairs. | Close the {room} door {how}, please. | A {thing} made of {stuff} stood in
        the {room}. | {he} fixed the {thing} with a bit of {stuff}. | We painted the {room} {colour} in
        {month}. | The key is under the {colour} {pot}. | My {garment} is hanging in the {room}. | There is a
        {beast} in our {room}! | Move the {thing} from the {room} to the {room}. | Someone knocked {how} on
        the {room} window. | The carpet was {colour}, and the curtains were {colour}. | Dust lay thick upon
        the {thing} in the {room}.""",
    "work": """
        {she} wants to be a {job}. | {kin} once met a {job} from {city}. | The {job} looked {mood} this
        morning. | Homework in {study} is due on {day}. | {he} teaches {study} to {n} pupils. | Ask the {job}
        about the {thing}. | Good work takes {n} hours and a cup of {drink}. | The {study} exam was {big}
        minutes too long. | I studied {study} before I became a {job}. | Every {job} in {city} needs a good
        {thing}. | Our {job} is {mood} whenever it is {sky}. | Sign here, and return the form by {day}. | She
        left {study} behind and trained as a {job}.""",
    "talk": """
        Good morning, {she}, how are you? | Are you {mood}, {he}? | Wait for me, said {kin} {how}. | I am not
        {mood}, I am just {mood}. | Thank you for the {thing}, {she}. | Would you like some {drink} or some
        {food}? | Why did {he} look so {mood} on {day}? | Tell {she} that the {ride} is late. | No, I have
        never been to {city}. | Yes, {kin} told me about the {thing}. | Sorry, I thought you were {he}. |
        What did {kin} say about the {garment}? | Do you know whose {colour} {garment} this is? | Nonsense,
        replied {she}, pouring the {drink}.""",
    "health": """
        {he} hurt his {part} playing {game}. | Rest your {part} for {n} days. | {she} is {mood} after a game
        of {game}. | Do you play {game} on {day}? | Drink {drink} and go to bed by {clock}. | We won the
        {game} match by {n} points. | My {part} aches when it is {sky}. | Bend your {part} {how}, then
        breathe out. | The nurse wrapped my {part} in clean cotton. | {game} is harder than it looks. | {kin}
        swims {n} lengths before breakfast. | Take {n} of these with a glass of {drink}. | Nothing cures a
        sore {part} like {n} days of sunshine.""",
    "stories": """
        Long ago, a {job} lived beside the {place}. | The {beast} spoke {how} to the {job}. | {she} opened
        the box and found a {colour} {thing}. | Inside the {tree} there was a tiny {room}. | {he} gave the
        {beast} his last piece of bread. | For {n} years the {job} searched for {metal}. | The king was
        {mood} and the queen was {mood}. | A {colour} light shone {how} through the {tree}. | They walked
        {how} until {clock}. | The map showed a road from {city} to nowhere. | Only {kin} knew what the
        {thing} was for. | The door was made of {metal} and locked with {n} keys. | And so the {job} became
        {mood} at last. | At the edge of the wood, the {beast} {how} bowed to {she}.""",
}.items()}

# ---- from templates to passages ----------------------------------------------------------------------------

def fill(template, split, rng):
    """One sentence from a template, no word used twice in it."""
    used = set()
    def pick(slot):
        words = WORDS[slot[1]] if split == "val" else WORDS[slot[1]][:-2]
        word = rng.choice([w for w in words if w not in used])
        used.add(word)
        return word
    text = re.sub(r"{(\w+)}", pick, template)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


def seconds(text):
    """About how long a sentence takes at the usual rate, including the pause after it."""
    return 0.20 + 0.056 * len(text)


Clip = namedtuple("Clip", "name voice tempo pitch level pauses sentences")


def plan(split, n_clips, taken, rng):
    """The clips of a split, a list of `Clip`."""
    # each topic deals its templates out like cards, so all are used about equally often
    decks, voices, counts, clips = {}, [], {}, []
    for i in range(n_clips):
        if i % len(TOPICS) == 0:
            topics = rng.sample(sorted(TOPICS), len(TOPICS))
        topic = topics[i % len(TOPICS)]
        if not voices:
            voices = [name for name, v in VOICES.items() for _ in range(v[3])]
            rng.shuffle(voices)
        voice = voices.pop()
        tempo, pitch = rng.uniform(0.87, 1.2), VOICES[voice][2] * rng.uniform(0.96, 1.04)
        length, passage = rng.uniform(11, 15.3), []
        while sum(map(seconds, passage)) / tempo < length:
            if not decks.get(topic):
                decks[topic] = TOPICS[topic][:] if split == "val" else TOPICS[topic][:-1]
                rng.shuffle(decks[topic])
            text = fill(decks[topic].pop(), split, rng)
            if text not in taken:
                taken.add(text)
                passage.append(text)
        counts[voice] = counts.get(voice, 0) + 1
        name, level = f"{voice}-{counts[voice]:03d}", rng.uniform(0.35, 0.8)
        pauses = [rng.uniform(0.1, 0.3) for _ in passage]
        clips.append(Clip(name, voice, tempo, pitch, level, pauses, passage))
    return clips

# ---- from text to sound ------------------------------------------------------------------------------------

def speak(voice, speed, texts, folder):
    """The sentences as a list of (samples, rate), read at `speed` times the engine's usual rate."""
    engine, name = VOICES[voice][:2]
    paths = [f"{folder}/{i}.wav" for i in range(len(texts))]
    if engine == "flite":
        stretch = f"duration_stretch={1 / speed:.3f}"
        commands = [["flite", "-voice", name, "--setf", stretch, "-t", text, "-o", path]
                    for text, path in zip(texts, paths)]
    elif engine == "espeak-ng":
        commands = [["espeak-ng", "-v", name, "-s", f"{175 * speed:.0f}", "-w", path, text]
                    for text, path in zip(texts, paths)]
    else:  # festival is slow to start, so it reads the whole passage in one go
        rate = (f'(set! hts_engine_params (cons (list "-r" {speed:.3f}) hts_engine_params))' if "hts" in name
                else f"(Parameter.set 'Duration_Stretch {1 / speed:.3f})")
        commands = [["festival", "-b", f"(voice_{name})", rate]
                    + [f'(utt.save.wave (utt.synth (Utterance Text "{text}")) "{path}")'
                       for text, path in zip(texts, paths)]]
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{engine} cannot speak as {name} ({done.stderr.strip()}): apt-get install {PACKAGES[engine]}")
    return [sf.read(path, dtype="float32") for path in paths]


def trim(x, rate):
    """Cut the engine's own silence, keeping 30 ms on each side."""
    loud = np.flatnonzero(np.abs(x) > 0.015 * np.abs(x).max())
    margin = int(0.03 * rate)
    return x[max(0, loud[0] - margin): loud[-1] + margin]


def render(clip, folder):
    """Write one clip; return its length in seconds."""
    name, voice, tempo, pitch, level, pauses, passage = clip
    parts = []
    with tempfile.TemporaryDirectory() as scratch:
        # playing faster by `pitch` also shortens, so the engine need only supply the rest of the tempo
        for (x, rate), pause in zip(speak(voice, tempo / pitch, passage, scratch), pauses):
            parts.append(soxr.resample(trim(x, rate), rate * pitch, RATE))
            parts.append(np.zeros(int(pause * RATE), np.float32))
    x = np.concatenate(parts[:-1])
    x *= level / np.abs(x).max()
    path = folder / f"{name}.ogg"
    # libsndfile spreads compression levels 1..0 evenly over 6..256 kbit/s
    sf.write(path, x, RATE, format="OGG", subtype="OPUS", compression_level=1 - (KBPS - 6) / 250)
    y, rate = sf.read(path)
    assert (rate, y.ndim) == (RATE, 1) and abs(len(y) - len(x)) < 0.01 * RATE, f"{path}: wrong rate or length"
    assert np.isfinite(y).all() and 0.2 < np.abs(y).max() < 1, f"{path}: silent or clipped"
    return len(y) / RATE


def main():
    parser = argparse.ArgumentParser(description="render the miniature speech corpus")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "speech",
                        help="folder whose train/ and val/ are replaced (default: %(default)s)")
    parser.add_argument("--more", type=int, default=0, help="further training clips (default: none)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.more >= 0:
        parser.error("--more must be 0 or more")
    for engine, packages in PACKAGES.items():
        if not shutil.which(engine):
            sys.exit(f"{engine} is not installed: apt-get install {packages}")

    taken = set()
    # val first: train then takes none of its sentences
    plans = {split: plan(split, n_clips, taken, random.Random(f"{args.seed} {split}"))
             for split, n_clips in (("val", CLIPS["val"]), ("train", CLIPS["train"] + args.more))}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # everything is rendered beside its destination and moved there at the end: no half-made corpus
    with tempfile.TemporaryDirectory(prefix=".speech-", dir=args.out.resolve().parent) as temp:
        for split, clips in plans.items():
            folder = Path(temp, split)
            folder.mkdir()
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                lengths = list(pool.map(lambda clip: render(clip, folder), clips))
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"{split}: {len(clips)} clips of {min(lengths):.1f} to {max(lengths):.1f} s, "
                  f"{sum(lengths) / 60:.1f} minutes, {sum(len(clip.sentences) for clip in clips)} sentences, "
                  f"{len({clip.voice for clip in clips})} voices, {size:,} bytes")
        args.out.mkdir(exist_ok=True)
        for split in plans:
            shutil.rmtree(args.out / split, ignore_errors=True)
            Path(temp, split).replace(args.out / split)


if __name__ == "__main__":
    main()
