"""Days of the year."""

DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def day_of_year(year, month, day):
    """Which day of the year a date is, from 1; by the Gregorian calendar."""
    is_leap = year % 4 == 0 and year % 100 != 0
    return sum(DAYS[: month - 1]) + day + (1 if is_leap and month > 2 else 0)
