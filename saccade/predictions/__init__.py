"""What a model says of a picture: text, JSON, and a picture that shows why."""

from saccade.predictions.classification import Classification, contact_sheet
from saccade.predictions.coco_results import CocoIds
from saccade.predictions.detection import Detections

__all__ = ["Classification", "CocoIds", "Detections", "contact_sheet"]
