"""The web page: what the API answers, for eyes. It is thin over the API's own views."""
