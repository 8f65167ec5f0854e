"""The whole story on the sample that ships inside the package."""
