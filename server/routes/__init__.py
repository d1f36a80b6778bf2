"""The routes: HTTP in, HTTP out. Preparation and answers are in the folders beside this one."""
