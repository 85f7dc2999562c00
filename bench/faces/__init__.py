"""Trainings on real faces, verified on people never seen."""
