"""The labelling app's web server: the REST API and the pages."""
