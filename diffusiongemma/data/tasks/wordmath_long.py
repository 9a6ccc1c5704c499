"""Templates of word problems with three and four steps, see `wordmath_templates`."""

from diffusiongemma.data.tasks.wordmath_templates import Template

THREE_STEPS = (
    Template(
        'two_prices',
        {'k': (2, 9), 'p': (2, 12), 'm': (2, 9), 'q': (2, 12)},
        (
            '{A} buys {k} hats for {p} dollars each and {m} books for {q} dollars each. How many '
            'dollars does {A.he} spend?',
            'At the {shop}, a hat costs {p} dollars and a book costs {q} dollars. {A} buys {k} '
            'hats and {m} books. How many dollars does {A.he} pay?',
        ),
        'The hats cost [x = k * p] dollars. The books cost [y = m * q] dollars. In all {A} pays '
        '[z = x + y] dollars.',
    ),
    Template(
        'bake_and_pack',
        {'k': (2, 9), 'b': (4, 20), 'm': (2, 9), 'n': (2, 20)},
        (
            '{A} bakes {k} trays of {bake} with {b} on each tray. {A.He} gives {c} {bake} to {B} '
            'and puts the rest equally into {m} {box}. How many {bake} are in each {box.one}?',
            'There are {b} {bake} on each of {k} trays. {A} eats or sells {c} {bake}. The others '
            'go equally into {m} {box}. How many {bake} does each {box.one} hold?',
        ),
        'The trays hold [t = k * b] {bake}. After {c} are gone, there are [r = t - c] {bake}. '
        'Each {box.one} holds [q = r / m] {bake}.',
        hidden=('t = k * b', 'r = m * n', 'c = t - r'),
    ),
    Template(
        'compare_three',
        {'a': (4, 20), 'k': (3, 9), 'c': (2, 40)},
        (
            '{A} has {a} {item}. {B} has {k} times as many {item} as {A}. {C} has {c} fewer '
            '{item} than {B}. How many more {item} does {C} have than {A}?',
            '{C} finds {c} fewer {item} than {B}. {B} finds {k} times as many {item} as {A}. {A} '
            'finds {a} {item}. How many more {item} does {C} find than {A}?',
        ),
        '{B} has [x = a * k] {item}. {C} has [y = x - c] {item}. {C} has [z = y - a] more '
        '{item} than {A}.',
    ),
    Template(
        'farm_pens',
        {'a': (5, 80), 'k': (2, 9), 'b': (3, 16), 'c': (3, 90)},
        (
            'A farm has {a} {animal} in a field and {k} pens with {b} {animal} in each pen. '
            '{A} sells {c} {animal}. How many {animal} does the farm have now?',
            '{A} has {k} pens with {b} {animal} in each, and {a} more {animal} in the field. '
            '{A.He} sells {c} {animal} at the {shop}. How many {animal} are left?',
        ),
        'The pens hold [x = k * b] {animal}. With the field there are [y = a + x] {animal}. '
        'After {c} are sold, [z = y - c] {animal} are left.',
    ),
    Template(
        'empty_seats',
        {'k': (4, 9), 'b': (8, 20), 'c': (5, 80), 'd': (5, 60)},
        (
            'The {place} has {k} rows of {b} seats. One day {c} adults and {d} children sit '
            'there. How many seats are empty?',
            '{c} adults and {d} children come to see {A} sing at the {place}. There are {k} rows '
            'with {b} seats in each row. How many seats are empty?',
        ),
        'There are [x = k * b] seats. In all [y = c + d] people come. So [z = x - y] seats are '
        'empty.',
    ),
    Template(
        'save_for_bike',
        {'a': (5, 70), 'b': (4, 20), 'k': (3, 9), 'c': (20, 180)},
        (
            '{A} has {a} dollars. {A.He} earns {b} dollars a week for {k} weeks and then buys a '
            'bike for {c} dollars. How many dollars does {A.he} have left?',
            'For {k} weeks, {B} gives {A} {b} dollars a week. {A} had {a} dollars before. Then '
            '{A.he} pays {c} dollars for a bike. How many dollars does {A} have left?',
        ),
        'In {k} weeks {A} gets [x = b * k] dollars. Then {A.he} has [y = a + x] dollars. After '
        'buying the bike, {A.he} has [z = y - c] dollars.',
    ),
    Template(
        'boxes_shared',
        {'k': (2, 9), 'b': (4, 20), 'm': (2, 9), 'c': (2, 15)},
        (
            '{A} has {k} {box} with {b} {fruit} in each. {A.He} shares all the {fruit} equally '
            'among {m} friends. {B} is one of them and eats {c}. How many {fruit} does {B} have '
            'left?',
            '{m} friends share {k} {box} of {fruit} equally. Each {box.one} holds {b} {fruit}. '
            'One of the friends is {B}, who eats {c} {fruit}. How many {fruit} does {B} have '
            'left?',
        ),
        'The {box} hold [x = k * b] {fruit}. Each friend gets [y = x / m] {fruit}. After {B} '
        'eats {c}, {B.he} has [z = y - c] {fruit}.',
    ),
    Template(
        'mean_of_three',
        {'q': (3, 20), 'a': (2, 40), 'b': (2, 40)},
        (
            '{A} bakes {a} {bake} on the first day, {b} on the second day and {c} on the third '
            'day. How many {bake} is that per day, on average?',
            'At the {shop}, {A} sells {a} {bake} on one day, {b} on the next day and {c} on the '
            'day after. What is the average per day?',
        ),
        'The first two days make [x = a + b] {bake}. All three days make [y = x + c] {bake}. '
        'The average is [z = y / 3] {bake} per day.',
        hidden=('t = q * 3', 'r = t - a', 'c = r - b'),
    ),
    Template(
        'price_difference',
        {'p': (5, 20), 'k': (2, 9), 'd': (2, 15), 'm': (2, 9)},
        (
            'At the market, {k} hats cost {s} dollars. At the store, {m} hats cost {t} dollars. '
            'How many dollars more does one hat cost at the market?',
            '{A} pays {s} dollars for {k} tickets at the market. {B} pays {t} dollars for {m} '
            'tickets at the store. How many dollars more does {A} pay for one ticket?',
        ),
        'The market price of one is [x = s / k] dollars. The store price of one is [y = t / m] '
        'dollars. The difference is [z = x - y] dollars.',
        hidden=('s = p * k', 'r = p - d', 't = r * m'),
    ),
    Template(
        'join_and_share',
        {'a': (2, 18), 'k': (2, 9), 'n': (3, 20), 'm': (2, 9)},
        (
            '{A} buys {k} {box} of {a} {bake} each. {B} brings {b} {bake}. They share all the '
            '{bake} equally among {m} children. How many {bake} does each child get?',
            '{B} has {b} {bake} and {A} has {k} {box} with {a} {bake} in each. {m} children at '
            'the {place} share all of them equally. How many {bake} does each child get?',
        ),
        'The {box} hold [x = k * a] {bake}. Together there are [y = x + b] {bake}. Each child '
        'gets [z = y / m] {bake}.',
        hidden=('x = k * a', 'y = m * n', 'b = y - x'),
    ),
    Template(
        'water_tank',
        {'a': (40, 190), 'b': (3, 15), 'k': (2, 9), 'c': (5, 90)},
        (
            'A tank holds {a} gallons of water. {A} uses {b} gallons every hour for {k} hours '
            'and then adds {c} gallons. How many gallons are in the tank now?',
            'Each hour, {A} takes {b} gallons of water from a tank of {a} gallons. After {k} '
            'hours {A.he} adds {c} gallons. How many gallons are in the tank then?',
        ),
        'In {k} hours {A} takes [x = b * k] gallons. Then there are [y = a - x] gallons. After '
        'adding {c}, there are [z = y + c] gallons.',
    ),
    Template(
        'three_ages',
        {'a': (4, 16), 'k': (2, 6), 'c': (2, 30)},
        (
            '{A} is {a} years old. {B} is {k} times as old as {A}. {C} is {c} years younger than '
            '{B}. How old are {A} and {C} together?',
            '{B} is {k} times as old as {A}, and {C} is {c} years younger than {B}. {A} is {a} '
            'years old. What do you get when you add the ages of {A} and {C}?',
        ),
        '{B} is [x = a * k] years old. {C} is [y = x - c] years old. {A} and {C} are '
        '[z = a + y] years old together.',
    ),
)

FOUR_STEPS = (
    Template(
        'shopping_change',
        {'k': (2, 9), 'p': (2, 10), 'm': (2, 9), 'q': (2, 10), 't': (60, 200)},
        (
            '{A} buys {k} balls for {p} dollars each and {m} books for {q} dollars each. {A.He} '
            'pays with {t} dollars. How many dollars does {A.he} get back?',
            '{A} takes {t} dollars to the {shop}. {A.He} buys {m} books for {q} dollars each and '
            '{k} balls for {p} dollars each. How many dollars are left?',
        ),
        'The balls cost [x = k * p] dollars. The books cost [y = m * q] dollars. In all {A} '
        'spends [z = x + y] dollars. {A.He} has [w = t - z] dollars left.',
    ),
    Template(
        'bakery_boxes',
        {'k': (2, 9), 'b': (3, 12), 'm': (2, 9), 'c': (3, 12), 'd': (2, 9)},
        (
            '{A} bakes {k} trays with {b} {bake} each. {B} bakes {m} trays with {c} {bake} each. '
            'They put all the {bake} into {box} of {d}. How many {box} do they fill?',
            'At the {shop} there are {k} trays of {b} {bake} and {m} trays of {c} {bake}. {A} '
            'puts {d} {bake} in each {box.one}. How many {box} does {A.he} need for all of them?',
        ),
        'The first trays hold [x = k * b] {bake}. The other trays hold [y = m * c] {bake}. '
        'Together there are [z = x + y] {bake}. They fill [w = z / d] {box}.',
    ),
    Template(
        'three_friends_total',
        {'a': (5, 60), 'b': (2, 40), 'c': (2, 40)},
        (
            '{A} has {a} {item}. {B} has {b} more {item} than {A}. {C} has {c} fewer {item} than '
            '{B}. How many {item} do the three have together?',
            '{A}, {B} and {C} collect {item}. {A} has {a}. {B} has {b} more than {A}, and {C} '
            'has {c} fewer than {B}. How many {item} do they have in all?',
        ),
        '{B} has [x = a + b] {item}. {C} has [y = x - c] {item}. {A} and {B} have [z = a + x] '
        '{item}. All three have [w = z + y] {item}.',
    ),
    Template(
        'farm_eggs',
        {'h': (2, 5), 'b': (2, 4), 'm': (3, 9), 'd': (2, 9), 'n': (2, 20)},
        (
            '{A} has {h} hens. Each hen lays {b} eggs a week. After {m} weeks {A.he} keeps {c} '
            'eggs and sells the rest in {box} of {d}. How many {box} does {A.he} sell?',
            'Each of the {h} hens on a farm lays {b} eggs a week. {A} takes the eggs of {m} '
            'weeks, eats {c} and packs the rest in {box} of {d} eggs. How many {box} are there?',
        ),
        'In one week there are [x = h * b] eggs. In {m} weeks there are [y = x * m] eggs. '
        'Without {c} eggs, there are [z = y - c] eggs. They fill [w = z / d] {box}.',
        hidden=('x = h * b', 'y = x * m', 'z = d * n', 'c = y - z'),
    ),
    Template(
        'savings_and_gifts',
        {'b': (3, 15), 'k': (2, 9), 'a': (3, 60), 'm': (2, 9), 'p': (2, 15)},
        (
            '{A} saves {b} dollars a week for {k} weeks. {B} gives {A.him} {a} dollars. Then {A} '
            'buys {m} gifts for {p} dollars each. How many dollars does {A} have left?',
            'In each of {k} weeks {A} earns {b} dollars. {A.He} also gets {a} dollars from {B}. '
            '{A.He} buys {m} tickets that cost {p} dollars each. How many dollars are left?',
        ),
        '{A} saves [x = b * k] dollars. With the money from {B}, {A.he} has [y = x + a] '
        'dollars. {A.He} spends [z = m * p] dollars. That leaves [w = y - z] dollars.',
    ),
    Template(
        'library_shelves',
        {'k': (3, 9), 'b': (5, 18), 'c': (5, 80), 'm': (2, 9), 'n': (2, 20)},
        (
            'A library has {k} shelves with {b} books each. People take {c} books and bring back '
            '{d} books. {A} puts all the books on {m} tables equally. How many books are on each '
            'table?',
            '{A} has {k} shelves of {b} books. {A.He} sells {c} books and buys {d} new ones. Then '
            '{A.he} puts all of them equally on {m} tables. How many books are on each table?',
        ),
        'The shelves hold [x = k * b] books. When {c} go, there are [y = x - c] books. When {d} '
        'come, there are [z = y + d] books. Each table has [w = z / m] books.',
        hidden=('x = k * b', 'y = x - c', 'z = m * n', 'd = z - y'),
    ),
    Template(
        'two_bus_stops',
        {'a': (10, 70), 'b': (2, 40), 'c': (2, 40), 'd': (2, 40), 'e': (2, 40)},
        (
            'A bus has {a} people. At the {place}, {b} people get off and {c} get on. At the '
            '{place2}, {d} get off and {e} get on. How many people are on the bus now?',
            '{A} drives a bus with {a} people. {b} people leave and {c} come in at the {place}. '
            'Then {d} leave and {e} come in at the {place2}. How many people are on the bus?',
        ),
        'First there are [x = a - b] people. Then there are [y = x + c] people. At the {place2} '
        'there are [z = y - d] people. At the end there are [w = z + e] people.',
    ),
    Template(
        'flower_rows',
        {'k': (2, 9), 'b': (3, 15), 'm': (2, 9), 'c': (3, 15), 'd': (2, 60)},
        (
            'A garden has {k} rows of {b} {color} {plant} and {m} rows of {c} {color2} {plant}. '
            '{A} cuts {d} of the {color} {plant}. How many {plant} are left in all?',
            '{A} plants {k} rows of {b} {color} {plant}, but {d} of these die. {A.He} also '
            'plants {m} rows of {c} {color2} {plant}. How many {plant} does {A.he} have?',
        ),
        'First there are [x = k * b] {color} {plant}. Without {d}, there are [y = x - d]. There '
        'are [z = m * c] {color2} {plant}. In all there are [w = y + z] {plant}.',
    ),
    Template(
        'long_trip',
        {'k': (2, 9), 'b': (5, 15), 'c': (5, 60), 'm': (2, 9), 'n': (2, 15)},
        (
            '{A} has a trip of {t} miles. {A.He} rides {b} miles an hour for {k} hours, then walks '
            '{c} miles. The rest takes {m} days, the same number of miles each day. How many '
            'miles is that each day?',
            'A trip is {t} miles long. {A} goes {b} miles an hour for {k} hours on {day}, and {c} '
            'miles on {day2}. {A.He} goes the rest in {m} days, the same number of miles each '
            'day. How many miles is that each day?',
        ),
        'In {k} hours {A} goes [x = b * k] miles. With {c} more, that is [y = x + c] miles. '
        'There are [z = t - y] miles left. Each day is [w = z / m] miles.',
        hidden=('x = b * k', 'y = x + c', 'z = m * n', 't = y + z'),
    ),
    Template(
        'sets_of_two',
        {'p': (2, 10), 'k': (2, 9), 'q': (2, 10), 'm': (2, 9), 'n': (2, 9)},
        (
            '{k} pens cost {s} dollars and {m} books cost {t} dollars. {A} makes {n} gifts with '
            'one pen and one book in each. How many dollars do the gifts cost in all?',
            'At the {shop}, {A} sees {k} pens for {s} dollars and {m} books for {t} dollars. '
            '{n} friends each want one pen and one book. How many dollars is that in all?',
        ),
        'One pen costs [x = s / k] dollars. One book costs [y = t / m] dollars. Both cost '
        '[z = x + y] dollars. So {n} times both cost [w = z * n] dollars.',
        hidden=('s = p * k', 't = q * m'),
    ),
    Template(
        'work_and_spend',
        {'k': (2, 9), 'm': (2, 9), 'p': (2, 9), 'a': (5, 60), 'c': (5, 120)},
        (
            '{A} has {a} dollars. {A.He} works {k} hours on {day} and {m} hours on {day2} for {p} '
            'dollars an hour. Then {A.he} spends {c} dollars. How many dollars does {A.he} have?',
            '{A} earns {p} dollars an hour at the {place}. {A.He} works {k} hours, and later {m} '
            'hours more. {A.He} had {a} dollars before and pays {c} dollars for a coat. How many '
            'dollars are left?',
        ),
        '{A} works [x = k + m] hours. {A.He} earns [y = x * p] dollars. With the money from '
        'before, {A.he} has [z = y + a] dollars. That leaves [w = z - c] dollars.',
    ),
    Template(
        'share_and_double',
        {'q': (2, 15), 'k': (3, 9), 'a': (2, 18), 'c': (2, 20), 'd': (2, 9)},
        (
            '{k} friends share {t} {item} equally. One of them is {A}, who already had {a} '
            '{item}. {A} loses {c}. {B} has {d} times as many {item} as {A} has now. How many '
            '{item} does {B} have?',
            '{A} has {a} {item}. Then {A.he} and others, {k} people in all, share {t} {item} '
            'equally. {A} gives {c} away. {B} has {d} times as many {item} as {A} now. How many '
            'does {B} have?',
        ),
        'Each one gets [x = t / k] {item}. {A} then has [y = x + a] {item}. Without {c}, {A} has '
        '[z = y - c] {item}. {B} has [w = z * d] {item}.',
        hidden=('t = q * k',),
    ),
    Template(
        'party_balloons',
        {'k': (2, 9), 'b': (5, 20), 'm': (2, 9), 'n': (2, 20), 'd': (2, 20)},
        (
            '{A} has {k} packs of {b} balloons, but {c} of them are broken. {m} children share '
            'the good ones equally. {B}, one of the children, then finds {d} more. How many '
            'balloons does {B} have?',
            'There are {k} packs with {b} balloons each for a party. {c} balloons pop. {m} '
            'children share the others equally, and {B} is one of them. {B.He} gets {d} more '
            'from {A}. How many balloons does {B} have?',
        ),
        'The packs hold [x = k * b] balloons. Without {c}, there are [y = x - c] balloons. Each '
        'child gets [z = y / m] balloons. {B} then has [w = z + d] balloons.',
        hidden=('x = k * b', 'y = m * n', 'c = x - y'),
    ),
)
