"""What is asked, and what counts as an answer: our own bank of small parts, for make.py.

Every part is meant to be easy, and to have one right answer. Left out are answers that workers write anyway when they
talk about their work ("right", "first", "found"), and numbers below twelve, which could number a line or a paragraph:
whoever has not answered is not to be right by chance.
"""

import unicodedata

Rows = dict[str, list[str]]  # what is asked, and the accepted alternatives


def table(text: str) -> Rows:
    """Rows, such as "hot: cold; big: small/little"."""
    rows = {}
    for row in text.split(";"):
        asked, answers = row.split(":")
        rows[" ".join(asked.split())] = [" ".join(answer.split()) for answer in answers.split("/")]
    return rows


# ---- questions: by the form of the question, what is put in it

FAMILIES = {
    "What is the capital of {}?": table("""
        Japan: Tokyo; France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon; England: London;
        Ireland: Dublin; Scotland: Edinburgh; Norway: Oslo; Sweden: Stockholm; Denmark: Copenhagen; Finland: Helsinki;
        Iceland: Reykjavik/Reykjavík; Poland: Warsaw; Austria: Vienna; Hungary: Budapest; Greece: Athens;
        Turkey: Ankara; Russia: Moscow; Ukraine: Kyiv/Kiev; China: Beijing; India: New Delhi/Delhi; South Korea: Seoul;
        Thailand: Bangkok; Vietnam: Hanoi; Indonesia: Jakarta; the Philippines: Manila; Egypt: Cairo; Kenya: Nairobi;
        Morocco: Rabat; Ethiopia: Addis Ababa; Canada: Ottawa; Cuba: Havana; Peru: Lima; Chile: Santiago;
        Argentina: Buenos Aires; Brazil: Brasilia/Brasília; Colombia: Bogota/Bogotá; Venezuela: Caracas;
        Australia: Canberra; New Zealand: Wellington; Belgium: Brussels; the Netherlands: Amsterdam;
        the Czech Republic: Prague; Romania: Bucharest; Bulgaria: Sofia; Serbia: Belgrade; Croatia: Zagreb;
        Iraq: Baghdad; Iran: Tehran/Teheran; the United States: Washington"""),
    "What is the opposite of {}?": table("""
        hot: cold; big: small/little; fast: slow/slower; happy: sad/unhappy; rich: poor; wet: dry; clean: dirty/unclean;
        strong: weak; loud: quiet/silent/soft; day: night; friend: enemy/foe; buy: sell; laugh: cry; push: pull;
        win: lose; north: south; east: west; thick: thin; wide: narrow; deep: shallow; inside: outside;
        sweet: sour/bitter; smooth: rough; war: peace; good: bad/evil; cheap: expensive/costly; beautiful: ugly;
        dead: alive/living; awake: asleep/sleeping; polite: rude/impolite; success: failure; summer: winter;
        guilty: innocent; ancient: modern; tight: loose"""),
    "What is the plural of {}?": table("""
        mouse: mice; child: children; foot: feet; goose: geese; man: men; woman: women; knife: knives; wolf: wolves;
        wife: wives; shelf: shelves; loaf: loaves; baby: babies; city: cities; box: boxes; church: churches;
        berry: berries; potato: potatoes; tomato: tomatoes; hero: heroes; bus: buses/busses; fox: foxes; thief: thieves;
        lady: ladies; country: countries; story: stories; ox: oxen; cherry: cherries; butterfly: butterflies;
        calf: calves"""),
    "What is the past tense of {}?": table("""
        go: went; eat: ate; sing: sang; drink: drank; swim: swam; break: broke; buy: bought; bring: brought;
        catch: caught; teach: taught; fly: flew; sleep: slept; speak: spoke; steal: stole; throw: threw; grow: grew;
        draw: drew; choose: chose; freeze: froze; feed: fed; fight: fought; hide: hid; run: ran; wear: wore;
        stand: stood; shake: shook; know: knew; write: wrote; dig: dug"""),
    "What is a young {} called?": table("""
        dog: puppy/pup; cat: kitten; cow: calf; horse: foal/colt/filly; sheep: lamb; duck: duckling; lion: cub;
        bear: cub; deer: fawn; frog: tadpole/froglet; kangaroo: joey; hen: chick/pullet; pig: piglet; wolf: pup/cub;
        eagle: eaglet/chick; tiger: cub; elephant: calf; seal: pup"""),
    "What is the chemical symbol of {}?": table("""
        gold: Au; silver: Ag; iron: Fe; sodium: Na; copper: Cu; lead: Pb; calcium: Ca; zinc: Zn; magnesium: Mg;
        mercury: Hg; tin: Sn; chlorine: Cl; lithium: Li; neon: Ne; silicon: Si; nickel: Ni"""),
    "Which chemical element has the symbol {}?": table("""
        K: potassium; O: oxygen; H: hydrogen; C: carbon; N: nitrogen; He: helium; S: sulfur/sulphur; U: uranium;
        P: phosphorus; Al: aluminium/aluminum"""),
    "Which day comes right after {}?": table("""
        Monday: Tuesday; Tuesday: Wednesday; Wednesday: Thursday; Thursday: Friday; Friday: Saturday; Saturday: Sunday;
        Sunday: Monday"""),
    "Which day comes right before {}?": table("""
        Monday: Sunday; Tuesday: Monday; Wednesday: Tuesday; Thursday: Wednesday; Friday: Thursday; Saturday: Friday;
        Sunday: Saturday"""),
    "Which month comes right after {}?": table("""
        January: February; March: April; May: June; June: July; July: August; August: September; September: October;
        October: November; November: December; December: January"""),
    "What colour do you get by mixing {}?": table("""
        blue and yellow: green; red and yellow: orange; red and blue: purple/violet; black and white: grey/gray;
        red and white: pink"""),
    "What colour is {}?": table("""
        a ripe banana: yellow; fresh grass: green; the sky on a clear day: blue; snow: white; coal: black;
        a ripe tomato: red; a carrot: orange; an emerald: green; a ruby: red; chocolate: brown; milk: white;
        a flamingo: pink"""),
    "Which language do most people in {} speak?": table("""
        Brazil: Portuguese; Mexico: Spanish; Egypt: Arabic; Japan: Japanese; China: Chinese/Mandarin; Russia: Russian;
        Germany: German; Austria: German; France: French; Italy: Italian; Greece: Greek; Poland: Polish;
        Sweden: Swedish; Norway: Norwegian; Turkey: Turkish; Argentina: Spanish; Australia: English;
        Portugal: Portuguese; Iran: Persian/Farsi; Israel: Hebrew; Thailand: Thai; Vietnam: Vietnamese;
        Hungary: Hungarian; Finland: Finnish; Denmark: Danish; South Korea: Korean; the United States: English;
        Cuba: Spanish; Peru: Spanish; Iceland: Icelandic; Saudi Arabia: Arabic"""),
    "On which continent is {}?": table("""
        Egypt: Africa/African; Kenya: Africa/African; Nigeria: Africa/African; Ghana: Africa/African;
        Brazil: South America/South American; Peru: South America/South American; Chile: South America/South American;
        Argentina: South America/South American; Canada: North America/North American;
        Mexico: North America/North American; France: Europe/European; Germany: Europe/European;
        Poland: Europe/European; Sweden: Europe/European; China: Asia/Asian; India: Asia/Asian; Thailand: Asia/Asian;
        Vietnam: Asia/Asian; the South Pole: Antarctica/Antarctic"""),
    "Which planet {}?": table("""
        is closest to the Sun: Mercury; is the largest of the solar system: Jupiter; is called the Red Planet: Mars;
        do we live on: Earth"""),
    "How many {}?": table("""
        months are in a year: 12/twelve; hours are in a day: 24/twenty-four; minutes are in an hour: 60/sixty;
        seconds are in a minute: 60/sixty; days has a year that is no leap year: 365; days has June: 30/thirty;
        letters has the English alphabet: 26/twenty-six; years are in a century: 100/hundred;
        cents are in a dollar: 100/hundred; centimetres are in a metre: 100/hundred;
        metres are in a kilometre: 1000/1,000/thousand; grams are in a kilogram: 1000/1,000/thousand;
        eggs are in a dozen: 12/twelve; weeks are in a year: 52/fifty-two; squares has a chessboard: 64/sixty-four;
        degrees has a right angle: 90/ninety; degrees has a full circle: 360;
        states have the United States: 50/fifty"""),
    "What sound does a {} make?": table("""
        cow: moo/moos/mooing; dog: bark/barks/barking/woof; cat: meow/meows/meowing/miaow/purr;
        duck: quack/quacks/quacking; lion: roar/roars/roaring; snake: hiss/hisses/hissing; bee: buzz/buzzes/buzzing;
        horse: neigh/neighs/neighing/whinny; owl: hoot/hoots/hooting; wolf: howl/howls/howling;
        frog: croak/croaks/croaking/ribbit"""),
    "What is the comparative of {}?": table("""
        big: bigger; happy: happier; hot: hotter; heavy: heavier; funny: funnier; thin: thinner; bad: worse;
        tall: taller; old: older/elder; young: younger; strong: stronger; dirty: dirtier"""),
    "What do we call somebody who {}?": table("""
        bakes bread: baker; flies a plane: pilot/aviator; writes books: author/writer/novelist;
        looks after teeth: dentist; cuts hair: barber/hairdresser/hairstylist; plays the piano: pianist;
        puts out fires: firefighter/fireman; treats sick animals: veterinarian/vet; plays the guitar: guitarist;
        travels in space: astronaut/cosmonaut; grows crops: farmer; takes photographs: photographer"""),
}

# ---- definitions: by the area it comes from, a word, and keywords one of which every right definition has

DEFINITIONS = {
    "land": table("""
        island: surrounded; desert: dry/arid/sand/sandy/rainfall/precipitation; forest: trees/tree;
        volcano: lava/magma/molten/erupt/erupts/eruption/eruptions;
        mountain: higher/elevated/elevation/rises/peak/summit/steep/landform"""),
    "animals": table("""
        penguin: bird/birds/flightless; snake: reptile/reptiles/legless; frog: amphibian/amphibians;
        spider: arachnid/arachnids/eight/web/webs; butterfly: insect/insects; bee: insect/insects/honey;
        eagle: bird/birds; shark: fish/predator/predatory;
        kangaroo: marsupial/marsupials/pouch/Australia/Australian"""),
    "occupations": table("""
        teacher: students/student/pupils/school/educates/instructs; baker: bread; farmer: crops/livestock/agriculture;
        pilot: aircraft/airplane/airplanes/plane/planes/aeroplane;
        doctor: medical/medicine/patients/health/illness/illnesses/diseases; lawyer: legal/law/court;
        nurse: medical/patients/patient/healthcare/health; astronaut: space"""),
    "tools": table("""
        umbrella: rain; knife: cut/cutting/cuts/blade; mirror: reflects/reflect/reflection/reflective;
        thermometer: temperature/temperatures; ladder: climb/climbing/rungs/steps; broom: sweep/sweeping/sweeps;
        compass: direction/directions/north/navigation/magnetic; hammer: nails/nail/hitting/driving;
        pencil: writing/write/drawing/draw/graphite; scissors: cut/cutting/cuts/blades"""),
    "buildings": table("""
        library: books/book; hospital: medical/patients/sick/medicine/health/healthcare; castle: fortified/fortress;
        museum: art/artifacts/history/historical/exhibits/exhibitions; bakery: bread/baked/bakes;
        airport: aircraft/airplanes/planes/flights/airlines; cinema: films/film/movies/movie;
        church: worship/religious/Christian/Christians"""),
    "the body": table("""
        heart: blood; lungs: oxygen/breathing/breathe/respiratory/respiration; skeleton: bones/bone;
        skin: covers/outer/covering/outermost"""),
    "food": table("""
        bread: flour/dough/wheat/grain; cheese: milk/dairy; honey: bees/bee/nectar; omelette: eggs/egg;
        wine: grapes/grape; chocolate: cocoa/cacao; butter: milk/cream/dairy; salad: vegetables/lettuce/greens"""),
    "times": table("""
        decade: ten/10 years/10-year; century: hundred/100; noon: midday/12/twelve/middle; week: seven/7 days;
        winter: season/cold/coldest/colder; summer: season/hot/hottest/warm/warmest"""),
    "vehicles": table("""
        bicycle: wheels/wheel/wheeled/pedals/pedal; submarine: underwater/submerged/submersible;
        helicopter: rotor/rotors/rotating/aircraft/blades; canoe: boat/paddle/paddles/paddled/paddling;
        tractor: farm/farms/farming/agricultural/agriculture;
        ambulance: emergency/medical/patients/hospital/injured"""),
    "the sky": table("""
        rainbow: colors/colours/colored/spectrum/arc/arch; moon: satellite/orbits/orbiting/orbit;
        snow: white/frozen/ice/crystals/flakes; lightning: electrical/electric/electricity/discharge/thunder;
        planet: orbits/orbit/orbiting/revolves"""),
    "instruments": table("""
        piano: musical/keys/keyboard; drum: musical/percussion; guitar: musical/strings/string/stringed;
        violin: musical/bow/strings/string/stringed; trumpet: musical/brass; flute: musical/woodwind"""),
}

# ---- translations: by language, an English word

TRANSLATIONS = {
    "French": table("""
        water: eau; milk: lait; apple: pomme; dog: chien; horse: cheval; bird: oiseau; house: maison; door: porte;
        window: fenêtre; chair: chaise; book: livre; school: école; tree: arbre; sun: soleil; moon: lune; star: étoile;
        sea: mer; river: rivière/fleuve; mountain: montagne; rain: pluie; snow: neige; fire: feu; night: nuit;
        father: père; mother: mère; brother: frère; king: roi; queen: reine; green: vert/verte; blue: bleu/bleue;
        white: blanc/blanche; black: noir/noire; heart: cœur/coeur; head: tête; shoe: chaussure; sugar: sucre;
        friend: ami/amie; child: enfant"""),
    "Spanish": table("""
        water: agua; milk: leche; cheese: queso; apple: manzana; egg: huevo; dog: perro/perra; cat: gato/gata;
        horse: caballo; bird: pájaro/ave; fish: pez/pescado; house: casa; door: puerta; window: ventana; chair: silla;
        book: libro; school: escuela/colegio; street: calle; tree: árbol; flower: flor; moon: luna; star: estrella;
        river: río; mountain: montaña/monte; rain: lluvia; fire: fuego; night: noche; father: padre; mother: madre;
        king: rey; queen: reina; green: verde; blue: azul; white: blanco/blanca; heart: corazón; head: cabeza; eye: ojo;
        shoe: zapato; sugar: azúcar; butter: mantequilla; friend: amigo/amiga"""),
    "German": table("""
        water: Wasser; bread: Brot; milk: Milch; cheese: Käse; apple: Apfel; egg: Ei; dog: Hund; cat: Katze;
        bird: Vogel; fish: Fisch; cow: Kuh; house: Haus; window: Fenster; chair: Stuhl; book: Buch; school: Schule;
        street: Straße; church: Kirche; sun: Sonne; moon: Mond; snow: Schnee; fire: Feuer; night: Nacht; father: Vater;
        mother: Mutter; brother: Bruder; sister: Schwester; king: König; queen: Königin; green: grün; blue: blau;
        white: weiß; black: schwarz; heart: Herz; head: Kopf; sugar: Zucker; salt: Salz; key: Schlüssel; garden: Garten;
        friend: Freund/Freundin; river: Fluss/Fluß"""),
}

# ---- functions: what is to be written, and what it is to do

FUNCTIONS = [
    "is_even(n): True if n is even",
    "is_odd(n): True if n is odd",
    "is_positive(n): True if n is greater than 0",
    "is_prime(n): True if n is a prime number",
    "is_palindrome(text): True if text reads the same backwards",
    "is_leap_year(year): True if year is a leap year",
    "is_vowel(letter): True if letter is a vowel",
    "is_empty(items): True if the list items is empty",
    "square(x): x times x",
    "cube(x): x times x times x",
    "double(x): twice x",
    "half(x): x divided by 2",
    "add(x, y): the sum of x and y",
    "subtract(x, y): x minus y",
    "multiply(x, y): the product of x and y",
    "divide(x, y): x divided by y",
    "average(numbers): the mean of a list of numbers",
    "total(numbers): the sum of a list of numbers",
    "largest(numbers): the greatest of a list of numbers",
    "smallest(numbers): the least of a list of numbers",
    "absolute(x): x without its sign",
    "factorial(n): the product of 1 to n",
    "fibonacci(n): the n-th Fibonacci number",
    "gcd(x, y): the greatest common divisor of x and y",
    "reverse(text): the text backwards",
    "first_word(text): the first word of the text",
    "last_item(items): the last item of a list",
    "count_words(text): how many words the text has",
    "count_vowels(text): how many vowels the text has",
    "remove_spaces(text): the text without its spaces",
    "shout(text): the text in capital letters, with an exclamation mark",
    "greet(name): the text Hello, and the name",
    "repeat(text, n): the text n times in a row",
    "unique(items): the items of a list without duplicates",
    "sort_numbers(numbers): the numbers in ascending order",
    "merge_lists(one, two): the items of both lists in one list",
    "to_fahrenheit(celsius): a temperature in degrees Fahrenheit",
    "to_celsius(fahrenheit): a temperature in degrees Celsius",
    "circle_area(radius): the area of a circle",
    "rectangle_area(width, height): the area of a rectangle",
    "sum_of_digits(n): the sum of the digits of n",
    "starts_with_a(text): True if the text begins with the letter a",
]

# ---- writing: a subject, and words one of which nearly every text on it has

FORMS = ["Write a short story about {}.", "Write a short poem about {}."]
SUBJECTS = table("""
    the sea: wave/waves/ocean/tide/shore/whales/dolphins/fish;
    a dog: bark/barked/barking/barks/paws/puppy/fur/furry/fluffy/wagging/leash;
    a bakery: bread/dough/oven/pastries/cakes/flour/baker/baked; a football match: goal/ball/team/teams/players/fans;
    a rose: petals/petal/thorns/bloom/bloomed/blooms/fragrant;
    a birthday: cake/candles/gifts/presents/party/celebrate/celebration; a thunderstorm: lightning/rain/clouds;
    a wizard: magic/magical/spell/spells/wand; a farm: crops/cows/chickens/barn/fields/farmer;
    a king: crown/throne/kingdom/castle/ruled/ruler/reign; a school: teacher/teachers/students/class/classroom/books;
    a library: books/book/shelves; a detective: clue/clues/case/crime/solve;
    an astronaut: space/rocket/planet/cosmos/galaxy; a pirate: ship/crew/sail/sails/sailed/sea/ocean/waves;
    a doctor: patient/patients/heal/healing/illness/sick/medicine; a spider: web/webs/spin/spins/silk/legs/insects""")


# ---- spellings


def with_spellings(word: str) -> list[str]:
    """A word, and how it is written where accents are not at hand: Käse, Kase, Kaese."""
    letters_alone = "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
    german = word
    for letter, instead in {"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss"}.items():
        german = german.replace(letter, instead)
    return list(dict.fromkeys([word, letters_alone, german]))
