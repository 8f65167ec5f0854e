"""The sample data set that ships inside the package."""
