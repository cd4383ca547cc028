"""Rows of comma-separated text."""


def split_row(line):
    """The fields of a line; a quoted one may hold commas, and two quotes for one."""
    fields, field, quoted = [], "", False
    index = 0
    while index < len(line):
        letter = line[index]
        if letter == '"':
            quoted = not quoted
        elif letter == "," and not quoted:
            fields.append(field)
            field = ""
        else:
            field += letter
        index += 1
    return [*fields, field]
