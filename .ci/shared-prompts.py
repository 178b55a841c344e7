"""Prints a system message of about 500 tokens, and writes 32 short prompts to the file named on the command line."""

import json
import sys
from pathlib import Path

THINGS = (
    "rivers bread clocks trains bees paper glass salt bridges maps kites snow tea violins ferries lighthouses mirrors "
    "bicycles soap wool volcanoes chess printing windmills compasses silk tunnels ice rockets umbrellas ink honey"
)
NEVER = (
    "the weather,politics,your own nature,prices,other assistants,religion,sports,medicine,law,weapons,gossip,"
    "the stock market,recipes,traffic,games,films,music,fashion,holidays"
)
prompts = [{"prompt": f"Tell me one fact about {thing}.", "max_tokens": 16} for thing in THINGS.split()]
Path(sys.argv[1]).write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
rules = (
    f"Rule {i}: answer in one short sentence, name your source, and never speak about {topic} unless you are asked."
    for i, topic in enumerate(NEVER.split(","), 1)
)
print("You are a careful guide in a museum of everyday things.", *rules)
