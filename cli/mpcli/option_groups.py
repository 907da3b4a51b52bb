"""The groups of options in help, in their order; a config class names the group of its fields."""

FIRST_GROUP = "Set these first"
DEFAULT_GROUP = "Run"
"for options that no config defines, such as --json"
GROUPS = (
    "Arguments",
    FIRST_GROUP,
    "Data",
    "Sequences",
    "Model",
    "Coder",
    "Optimizer",
    "Loss",
    "Storage",
    "Evaluation",
    DEFAULT_GROUP,
    "Parallel",
)
"all groups, in the order of help"
ON = "[default: on]"
"how the help of a switch says that it is on by default"
