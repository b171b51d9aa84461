"""Word lists that contents are drawn from; written out here, so that pages need no files but the fonts."""


def _listed(text: str, separator: str | None = None) -> tuple[str, ...]:
    """The entries of a text, whose lines end between two."""
    entries = text.split() if separator is None else text.strip().replace("\n", separator).split(separator)
    return tuple(entries)


NOUNS = _listed(
    """
anchor apple apron arch arrow atlas attic autumn badge bag bakery ball bamboo banana bank barley barn barrel basket
bath battery beach bead beam bean bear beard bed bee bell belt bench berry bicycle bird biscuit blanket block blossom
board boat bolt bone book boot border bottle boulder bowl box bracket branch brass bread brick bridge broom brush
bucket bud button cabin cabinet cable cactus cake camel camera canal candle canoe canvas cape captain car card carpet
carrot cart castle cat cave cedar cellar chain chair chalk channel cheese cherry chest chicken chimney circle clay
cliff clock cloth cloud clover coal coast coat cobbler coffee coin collar comb compass copper coral cord cork corn
corner cotton cottage couch cow crab cradle crane crayon cream creek cricket crown crystal cup curtain cushion daisy
dawn deer desert desk diamond dish dock doctor dog doll donkey door dove dragon drawer dream dress drum duck dust
eagle ear earth easel echo edge egg elbow elephant elm engine evening eye fabric falcon farm feather fence fern ferry
field fig finger fire fish flame flask flint flock flour flower flute fog forest fork fossil fountain fox frame frog
frost fruit funnel gallery garden garlic gate ginger glacier glass globe glove goat gold goose grain granite grape
grass gravel guitar hammer hammock harbour hat hawk hazel heart hedge helmet herb heron hill honey hook horn horse
hotel house ice idea igloo ink insect iris iron island ivory ivy jacket jar jasmine jewel journal judge juice jungle
kettle key kitchen kite knee knife knot ladder lake lamb lamp lantern leaf leather lemon lens letter library lily lime
linen lion lizard lock log lotus lunch magnet mango map maple marble market mask meadow medal melon metal mill mint
mirror mist monkey moon morning moss moth motor mountain mouse museum mushroom music nail napkin nest net night noodle
north notebook nurse oak oar oat ocean office olive onion orange orbit orchard orchid otter oven owl oyster paddle
paint palace palm pan panda paper parcel park parrot path peach peanut pear pearl pebble pen pencil pepper piano
picture pigeon pillow pilot pine pipe planet plate plough plum pocket poem pond poppy porch potato powder prairie
pumpkin puzzle quarry quartz queen quilt rabbit radio raft rail rain ramp raven reed ribbon rice ridge ring river road
robin rock rocket roof room root rope rose rudder rug sail salad salmon salt sand saddle scarf school screw
sea seal seed shadow shark sheep shelf shell ship shirt shoe shovel silk silver sink sky sleeve slope smoke snail snow
soap sock sofa soil song soup south sparrow spice spider sponge spoon spring spruce square squirrel stable star
statue steam steel stem stone storm stove straw stream street string sugar summer sun swallow swan table tailor tea
temple tent theatre thistle thread thunder ticket tiger tile timber toast tomato tower town track trail train tray tree
trumpet tulip tunnel turkey turtle umbrella valley valve vase velvet village vine violet violin wagon wall walnut
water wave wax well whale wheat wheel whistle willow wind window wing winter wolf wood wool yarn year zebra
"""
)

ADJECTIVES = _listed(
    """
amber ancient blue bold brave brief bright brisk broad brown calm clean clear clever cold cool crimson curly dark deep
double dry early eager empty fair famous fancy fast fine first flat fresh full gentle giant gold golden grand great
green grey happy heavy high hollow honest hot huge inner kind large late lazy light little lively long loud lucky main
mild modern narrow neat new noble northern odd old open outer pale plain polite proud purple quick quiet rapid rare red
rich ripe rough round royal scarlet secret sharp short silent silver simple slow small smooth soft solid southern spare
steady steep still strong sunny sweet swift tall thick thin tiny upper vast warm western white wide wild wise yellow
young
"""
)

VERBS = _listed(
    """
builds carries catches changes checks cleans collects counts covers crosses cuts draws drives fills finds follows
guards holds keeps leads leaves lifts likes loses makes measures meets mends moves needs opens orders packs paints
passes plants prints pulls pushes reads repairs returns rolls sells sends sews shows sorts takes tests turns uses
visits washes watches weighs writes
"""
)

FIRST_NAMES = _listed(
    """
Aaron Abigail Ada Adam Agnes Ahmed Aisha Alan Albert Alice Amelia Amina Amy Ana Andre Andrea Anna Anton Arthur Astrid
Ben Bianca Boris Bruno Carla Carlos Caroline Cecilia Charles Chloe Clara Colin Cora Daniel Daria David Deborah Diana
Diego Dora Dylan Edith Edward Elena Eli Elias Elise Ella Elsa Emil Emily Emma Eric Erin Esther Eva Evan Felix Fiona
Florence Frank Frida Gabriel Gemma George Georgia Grace Greta Gustav Hannah Harold Harry Hassan Hazel Heidi Helen Henry
Hugo Ian Ibrahim Ida Igor Ines Ingrid Irene Isaac Isabel Ivan Jack Jacob James Jana Jane Jasmin Joan John Jonas Joseph
Judith Julia Karim Karl Kate Keith Kira Lara Laura Lena Leo Leon Liam Lily Linda Lisa Louis Lucas Lucy Lydia Magnus
Marco Maria Mark Marta Martin Mary Max Maya Mia Michael Mila Mira Mona Nadia Naomi Nathan Nicholas Nina Noah Nora Olga
Oliver Olivia Omar Oscar Otto Patrick Paula Peter Petra Philip Pia Rachel Ralph Raj Rebecca Robert Rosa Ruth Ryan Samir
Samuel Sara Sean Silvia Simon Sofia Stella Stephen Susan Tara Theo Thomas Tim Uma Ursula Vera Victor Viola Walter Wendy
William Yara Yusuf Zara Zoe
"""
)

SURNAMES = _listed(
    """
Abbott Adams Ahmed Allen Anderson Andrews Archer Armstrong Atkins Austin Bailey Baker Banks Barker Barnes Bates Becker
Bell Bennett Berg Bishop Black Blake Booth Bradley Brandt Brooks Brown Bryant Burke Burton Butler Byrne Campbell Carr
Carter Castro Chapman Chen Clark Cole Collins Cook Cooper Costa Cox Craig Crawford Cross Cruz Curtis Dalton Davies
Dawson Dean Dixon Doyle Duncan Dunn Edwards Elliott Ellis Evans Farrell Ferrari Fischer Fisher Fleming Fletcher Ford
Foster Fox Francis Fraser Freeman Garcia Gardner Gibson Gilbert Gill Gordon Graham Grant Gray Green Griffin Haas Hall
Hamilton Hansen Harper Harris Hart Hayes Henderson Hill Hoffman Holmes Howard Hughes Hunt Ibrahim Jackson James Jansen
Jensen Johnson Jones Jordan Kaya Keller Kelly Kennedy Khan Kim King Klein Knight Kowalski Kumar Lambert Lane Larsen
Lawson Lee Lewis Lin Lloyd Lopez Lynch Marsh Martin Mason Matthews Meyer Miller Mills Mitchell Moore Moreno Morgan
Morris Murphy Nash Nelson Newman Nguyen Nolan Novak Olsen Osborne Owen Palmer Parker Patel Payne Perez Perry Peters
Petrov Porter Powell Price Quinn Ramos Reed Reid Reyes Rice Roberts Robinson Rogers Romero Rossi Russell Santos Sato
Schmidt Scott Shah Sharp Shaw Silva Simpson Singh Smith Spencer Stein Stevens Stone Suzuki Tanaka Taylor Thompson
Torres Tucker Turner Vance Vargas Vogel Wagner Walker Wallace Walsh Ward Watson Weaver Webb Weber West White Wilson
Wolf Wong Wood Wright Yang Young Zimmer
"""
)

CITIES = _listed(
    """
Aberdeen Adelaide Amsterdam Athens Atlanta Austin Bangkok Barcelona Basel Belfast Belgrade Bergen Berlin Birmingham
Boston Bremen Brisbane Bristol Brussels Budapest Cairo Calgary Cambridge Cardiff Chicago Cologne Copenhagen Cork Dallas
Delhi Denver Dover Dresden Dublin Durban Edinburgh Essen Exeter Florence Frankfurt Geneva Genoa Ghent Glasgow Hamburg
Hanoi Helsinki Houston Istanbul Jakarta Kyoto Leeds Leipzig Lima Linz Lisbon Liverpool London Lyon Madrid Manchester
Manila Marseille Melbourne Memphis Miami Milan Montreal Mumbai Munich Nairobi Naples Nashville Newcastle Nice Norwich
Oslo Ottawa Oxford Paris Perth Phoenix Portland Porto Prague Quebec Reading Riga Rome Rotterdam Salzburg Santiago
Seattle Seoul Seville Sheffield Singapore Sofia Stockholm Sydney Tallinn Tampa Tokyo Toronto Trieste Turin Utrecht
Valencia Vancouver Venice Vienna Vilnius Warsaw Wellington York Zagreb Zurich
"""
)

STREET_NAMES = _listed(
    """
Abbey Acorn Albert Alder Ash Baker Bay Beech Birch Bridge Broad Brook Canal Castle Cedar Chapel Cherry Church Cliff
Coach College Commerce Cross Dale Dock East Elm Factory Ferry Forest Fountain Garden George Grand Grange Green Grove
Harbour Hazel High Hill Holly Ivy Juniper King Lake Laurel Liberty Lime Linden Magnolia Maple Market Meadow Mill Moor
Museum North Oak Orchard Palace Park Pine Poplar Prince Priory Queen Railway Ridge River Rose Rowan School South Spring
Station Sycamore Temple Union Valley Victoria Walnut Water West Willow Windsor Wood
"""
)
STREET_KINDS = (
    "Street",
    "Road",
    "Avenue",
    "Lane",
    "Way",
    "Place",
    "Square",
    "Drive",
    "Court",
    "Row",
    "St",
    "Rd",
    "Ave",
)

COMPANY_KINDS = ("Ltd", "Inc", "GmbH", "AG", "LLC", "Co", "Group", "Partners", "& Sons", "Works", "Trading", "PLC")
SHOP_KINDS = (
    *(
        "Bakery",
        "Books",
        "Cafe",
        "Deli",
        "Diner",
        "Florist",
        "Foods",
        "Garage",
        "Grill",
        "Hardware",
        "Hotel",
        "Kitchen",
    ),
    *("Market", "Music", "Optics", "Pharmacy", "Pizza", "Shoes", "Store", "Supplies", "Tea House", "Tools", "Toys"),
)

GOODS = _listed(
    """
adapter apple pie|bag of rice|baking powder|ball pen|bath towel|battery pack|bed sheet|bike lock|black tea|book stand
bottle opener|brown bread|butter|cable 2m|calendar|camera strap|candle set|car wax|cheese|chicken soup|chocolate|coffee
coffee cup|cookies|corn flakes|cotton shirt|cream|crackers|desk fan|desk lamp|dish soap|door mat|drill bit|duct tape
earphones|eggs|envelopes|extension cord|fish fillet|flashlight|flour|folder|frying pan|garden hose|glue stick|gloves
grape juice|green tea|ham|hand cream|hammer|headset|honey|ink cartridge|jam|keyboard|kettle|key ring|kitchen knife
ladder|lemonade|light bulb|marker|measuring tape|memory card|milk|mineral water|monitor|mouse pad|mug|mustard|nails
napkins|noodles|notebook|oat milk|office chair|olive oil|onions|orange juice|paint brush|paper clips|pasta|peanuts
pencil case|pepper|phone case|picture frame|pillow|plant pot|potatoes|power strip|printer paper|raincoat|rice|router
ruler|salad|salt|sandwich|scarf|scissors|screwdriver|shampoo|shelf|shoe polish|socks|speaker|sponge|stapler|sugar
sunscreen|tea pot|tent|tissues|toast|tomato sauce|toothbrush|umbrella|USB cable|vinegar|wall clock|wallet|water bottle
wool hat|wrench|yoghurt
""",
    separator="|",
)

SERVICES = (
    *("Consulting", "Training", "Delivery", "Support", "Cleaning", "Repair", "Design work", "Installation", "Rent"),
    *("Inspection", "Licence", "Maintenance", "Hosting", "Translation", "Storage", "Survey", "Printing", "Assembly"),
    *("Travel", "Analysis", "Editing", "Security", "Catering", "Transport", "Testing", "Planning", "Painting"),
)

UNITS = ("kg", "g", "l", "ml", "m", "cm", "mm", "km", "h", "min", "s", "W", "V", "A", "Hz", "MB", "GB", "%", "t", "lb")
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
