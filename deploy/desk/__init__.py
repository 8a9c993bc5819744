"""The desk: web pages where a catalogue team tries, reviews, corrects, measures and rolls out.

    pages/      the routes of each page
    templates/  their HTML
    static/     the style sheet, the script and htmx
    languages/  the translations

Long work runs as jobs, and a job is an `aisle` command in a process of its own. So the desk does what the commands do.
"""
