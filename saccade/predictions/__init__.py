"""What a model says of a picture or of a text: text, JSON, and a picture that shows why."""

from saccade.predictions.classification import Classification, contact_sheet
from saccade.predictions.coco_results import CocoIds
from saccade.predictions.detection import Detection, Detections
from saccade.predictions.translation import Translation

__all__ = ["Classification", "CocoIds", "Detection", "Detections", "Translation", "contact_sheet"]
