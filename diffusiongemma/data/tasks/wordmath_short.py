"""Templates of word problems with one and two steps, see `wordmath_templates`."""

from diffusiongemma.data.tasks.wordmath_templates import Template

ONE_STEP = (
    Template(
        'buy_more',
        {'a': (5, 130), 'b': (2, 70)},
        (
            '{A} has {a} {item}. {A.He} buys {b} more at the {shop}. How many {item} does {A} '
            'have now?',
            'At the {shop}, {A} buys {b} {item}. {A.He} already had {a} {item} at home. How many '
            '{item} does {A.he} have in all?',
        ),
        '{A} starts with {a} {item} and buys {b} more. Now {A.he} has [c = a + b] {item}.',
    ),
    Template(
        'give_away',
        {'a': (20, 190), 'b': (3, 90)},
        (
            '{A} has {a} {item}. {A.He} gives {b} of them to {B}. How many {item} does {A} have '
            'left?',
            '{A} takes {a} {item} to the {place} and gives {b} {item} to {B} there. How many '
            '{item} does {A.he} still have?',
        ),
        '{A} has {a} {item} and gives away {b}. That leaves [c = a - b] {item}.',
    ),
    Template(
        'rows',
        {'a': (2, 9), 'b': (3, 20), 'c': (2, 20)},
        (
            'There are {a} rows of chairs at the {place}. Each row has {b} chairs. The {place} '
            'also has {c} tables. How many chairs are there?',
            '{A} puts {c} tables and {a} rows of chairs at the {place}, with {b} chairs in each '
            'row. How many chairs does {A.he} put there?',
        ),
        'There are {a} rows and each row has {b} chairs. In all there are [d = a * b] chairs.',
    ),
    Template(
        'share',
        {'q': (2, 20), 'k': (3, 9), 'd': (2, 20)},
        (
            '{A} has {t} {item} and {d} books. {A.He} shares the {item} equally among {k} '
            'friends. How many {item} does each friend get?',
            '{k} friends find {t} {item} at the {place}, and {A} finds {d} books. The friends '
            'share the {item} equally. How many {item} does each friend get?',
        ),
        'The {t} {item} are shared equally among {k} friends. Each friend gets [p = t / k] {item}.',
        hidden=('t = q * k',),
    ),
    Template(
        'how_many_more',
        {'a': (30, 190), 'b': (5, 120)},
        (
            '{A} has {a} {item} and {B} has {b} {item}. How many more {item} does {A} have than '
            '{B}?',
            '{B} finds {b} {item} at the {place}. {A} finds {a} {item} there. How many more '
            '{item} than {B} does {A} find?',
        ),
        '{A} has {a} {item} and {B} has {b} {item}. The difference is [c = a - b] {item}.',
    ),
    Template(
        'times_as_many',
        {'a': (2, 20), 'k': (2, 9), 'd': (2, 20)},
        (
            '{A} has {a} {fruit} and {d} {bake}. {B} has {k} times as many {fruit} as {A}. How '
            'many {fruit} does {B} have?',
            '{A} picks {a} {fruit} in {d} hours. {B} picks {k} times as many {fruit} as {A}. How '
            'many {fruit} does {B} pick?',
        ),
        '{A} has {a} {fruit}, and {B} has {k} times as many. So {B} has [c = a * k] {fruit}.',
    ),
    Template(
        'pages_left',
        {'a': (50, 200), 'b': (10, 150)},
        (
            '{A} is reading a book of {a} pages at the {place}. {A.He} has read {b} pages so far. '
            'How many pages are left?',
            'A book has {a} pages. {A} read {b} pages of it on {day}. How many pages does {A.he} '
            'still have to read?',
        ),
        'The book has {a} pages and {A} has read {b} of them. {A.He} has [c = a - b] pages left.',
    ),
    Template(
        'older',
        {'a': (4, 60), 'b': (2, 40)},
        (
            '{A} is {a} years old. {B} is {b} years older than {A}. How old is {B}?',
            '{B} is {b} years older than {A}. {A} is {a} years old. How many years old is {B}?',
        ),
        '{A} is {a} years old and {B} is {b} years older. So {B} is [c = a + b] years old.',
    ),
    Template(
        'every_day',
        {'b': (3, 20), 'k': (2, 9), 'd': (2, 30)},
        (
            '{A} runs {b} miles every day and then rests for {d} minutes. How many miles does '
            '{A.he} run in {k} days?',
            'Every day {A} swims for {d} minutes and walks {b} miles to the {place}. How many '
            'miles does {A.he} walk in {k} days?',
        ),
        '{A} goes {b} miles each day for {k} days. That makes [c = b * k] miles.',
    ),
    Template(
        'pack_boxes',
        {'q': (2, 20), 'k': (3, 9), 'd': (2, 20)},
        (
            '{A} packs {t} {fruit} into {box}. Each {box.one} holds {k} {fruit}. {A.He} works '
            'for {d} minutes. How many {box} does {A.he} fill?',
            'It takes {A} {d} minutes to put {t} {bake} into {box}, with {k} {bake} in each '
            '{box.one}. How many {box} does {A.he} use?',
        ),
        'There are {t} in all and {k} go into each {box.one}. {A} needs [p = t / k] {box}.',
        hidden=('t = q * k',),
    ),
    Template(
        'need_more_money',
        {'a': (5, 120), 'c': (30, 200)},
        (
            '{A} has saved {a} dollars. {A.He} wants to buy a bike at the {shop} for {c} dollars. '
            'How many more dollars does {A.he} need?',
            'A bike costs {c} dollars at the {shop}. {A} has only {a} dollars. How many more '
            'dollars must {A.he} save?',
        ),
        'The bike costs {c} dollars and {A} has {a} dollars. {A.He} needs [d = c - a] more '
        'dollars.',
    ),
    Template(
        'two_colors',
        {'a': (5, 110), 'b': (5, 90)},
        (
            '{A} counts {a} {color} cars and {b} {color2} cars near the {place}. How many cars '
            'does {A.he} count in all?',
            'There are {a} {color} cars and {b} {color2} cars at the {place}. How many cars are '
            'there in all?',
        ),
        'There are {a} {color} cars and {b} {color2} cars. Together that makes [c = a + b] cars.',
    ),
)

TWO_STEPS = (
    Template(
        'buy_bags',
        {'a': (2, 60), 'b': (2, 9), 'c': (2, 15)},
        (
            '{A} has {a} {fruit}. {A.He} buys {b} {box} with {c} {fruit} in each. How many '
            '{fruit} does {A} have now?',
            '{A} buys {b} {box} at the {shop}. Each {box.one} holds {c} {fruit}. {A.He} already '
            'had {a} {fruit}. How many {fruit} does {A.he} have in all?',
        ),
        'The {box} hold [p = b * c] {fruit}. Now {A} has [q = a + p] {fruit}.',
    ),
    Template(
        'sell_two_days',
        {'a': (40, 200), 'b': (5, 80), 'c': (5, 80)},
        (
            'A shop has {a} {item}. It sells {b} {item} on {day} and {c} {item} on {day2}. How '
            'many {item} are left?',
            '{A} has {a} {item} to sell. {A.He} sells {b} of them on {day} and {c} on {day2}. How '
            'many {item} are left?',
        ),
        'After {day} there are [d = a - b] {item}. After {day2} there are [e = d - c] {item} left.',
    ),
    Template(
        'change',
        {'k': (2, 9), 'b': (2, 15), 'a': (20, 160)},
        (
            '{A} buys {k} tickets for {b} dollars each. {A.He} pays with {a} dollars. How many '
            'dollars does {A.he} get back?',
            'At the {shop}, a hat costs {b} dollars. {A} buys {k} hats and had {a} dollars '
            'before. How many dollars does {A.he} have left?',
        ),
        'All of it costs [c = k * b] dollars. {A} has [d = a - c] dollars left.',
    ),
    Template(
        'pick_and_share',
        {'q': (3, 20), 'k': (2, 9), 'a': (2, 90)},
        (
            '{A} picks {a} {fruit} and {B} picks {b} {fruit}. They put them equally into {k} '
            '{box}. How many {fruit} are in each {box.one}?',
            '{A} brings {a} {fruit} and {B} brings {b} {fruit} to the {place}. They share all of '
            'them equally in {k} {box}. How many {fruit} does each {box.one} hold?',
        ),
        'Together they have [s = a + b] {fruit}. Each of the {k} {box} holds [p = s / k] {fruit}.',
        hidden=('t = q * k', 'b = t - a'),
    ),
    Template(
        'share_then_eat',
        {'q': (5, 20), 'k': (2, 9), 'c': (2, 12)},
        (
            '{A} shares {t} {bake} equally among {k} friends. {B} is one of them and eats {c} '
            '{bake}. How many {bake} does {B} have left?',
            '{k} friends share {t} {bake} equally. {B} is one of the friends. {B.He} eats {c} '
            '{bake}. How many {bake} does {B.he} have left?',
        ),
        'Each friend gets [p = t / k] {bake}. After {B} eats {c}, {B.he} has [r = p - c] {bake} '
        'left.',
        hidden=('t = q * k',),
    ),
    Template(
        'times_and_total',
        {'a': (3, 20), 'k': (2, 8), 'd': (6, 15)},
        (
            '{A} is {d} years old and has {a} {item}. {B} has {k} times as many {item} as {A}. '
            'How many {item} do they have together?',
            'In {d} minutes, {A} finds {a} {item} at the {place}. {B} finds {k} times as many. '
            'How many {item} do they find together?',
        ),
        '{B} has [b = a * k] {item}. Together {A} and {B} have [c = a + b] {item}.',
    ),
    Template(
        'bus_stop',
        {'a': (10, 80), 'b': (2, 50), 'c': (2, 40)},
        (
            'There are {a} people on a bus. At the {place}, {b} people get off and {c} people get '
            'on. How many people are on the bus now?',
            '{A} drives a bus with {a} people. At the {place}, {b} people leave and {c} people '
            'come in. How many people are on the bus then?',
        ),
        'When {b} people leave, there are [d = a - b] people. When {c} people come in, there are '
        '[e = d + c] people.',
    ),
    Template(
        'save_and_spend',
        {'b': (3, 20), 'k': (3, 9), 'c': (5, 120)},
        (
            '{A} saves {b} dollars every week for {k} weeks. Then {A.he} spends {c} dollars at '
            'the {shop}. How many dollars does {A.he} have left?',
            'For {k} weeks {A} gets {b} dollars a week. {A.He} pays {c} dollars for a coat. How '
            'many dollars are left?',
        ),
        'In {k} weeks {A} gets [d = b * k] dollars. After paying {c} dollars, {A.he} has '
        '[e = d - c] dollars.',
    ),
    Template(
        'fewer_and_total',
        {'a': (10, 110), 'b': (2, 80)},
        (
            '{A} has {a} {animal}. {B} has {b} fewer {animal} than {A}. How many {animal} do they '
            'have together?',
            '{A} counts {a} {animal} at the farm. {B} counts {b} fewer {animal} than {A}. How '
            'many {animal} do they count in all?',
        ),
        'For {B} there are [c = a - b] {animal}. For {A} and {B} together there are [d = a + c] '
        '{animal}.',
    ),
    Template(
        'read_the_rest',
        {'q': (5, 20), 'k': (2, 9), 'b': (10, 120)},
        (
            'A book has {a} pages. {A} has read {b} pages. {A.He} reads the rest in {k} days, the '
            'same number each day. How many pages does {A.he} read each day?',
            '{A} has a book of {a} pages and reads {b} of them on {day}. {A.He} wants to finish '
            'in {k} more days. How many pages a day must {A.he} read?',
        ),
        'There are [r = a - b] pages left. In {k} days, that is [p = r / k] pages each day.',
        hidden=('t = q * k', 'a = t + b'),
    ),
    Template(
        'rope_pieces',
        {'q': (2, 20), 'k': (4, 9), 'c': (2, 8)},
        (
            '{A} cuts a rope of {t} feet into {k} equal pieces. {A.He} uses {c} of the pieces. '
            'How many feet of rope does {A.he} use?',
            'A rope of {t} feet is cut into {k} equal pieces. {A} takes {c} pieces to the '
            '{place}. How many feet of rope does {A.he} take?',
        ),
        'Each piece is [p = t / k] feet long. The {c} pieces are [r = p * c] feet long.',
        hidden=('t = q * k', 'spare = k - c'),
    ),
    Template(
        'work_days',
        {'b': (2, 9), 'k': (2, 8), 'd': (2, 9), 'e': (2, 20)},
        (
            '{A} works {k} hours a day and earns {b} dollars an hour. {A.He} is {e} minutes late '
            'once. How many dollars does {A.he} earn in {d} days?',
            'At the {place}, {A} works for {d} days, {k} hours each day. {A.He} walks {e} minutes '
            'to get there. {A.He} earns {b} dollars an hour. How many dollars does {A.he} earn?',
        ),
        'In one day {A} earns [p = k * b] dollars. In {d} days {A.he} earns [r = p * d] dollars.',
    ),
    Template(
        'price_of_more',
        {'q': (2, 20), 'k': (2, 9), 'm': (2, 9)},
        (
            '{k} hats cost {t} dollars at the {shop}. How many dollars do {m} hats cost?',
            '{A} pays {t} dollars for {k} books. All of them have the same price. How many '
            'dollars would {m} books cost?',
        ),
        'One of them costs [p = t / k] dollars. So {m} of them cost [r = p * m] dollars.',
        hidden=('t = q * k',),
    ),
)
