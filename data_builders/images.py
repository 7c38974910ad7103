"""Images on their way into RLDS: decoding, resizing, JPEG."""

import io

import cv2
import numpy as np
import PIL.Image

from jaxvp.errors import UserError


def encode_jpeg(image: np.ndarray) -> bytes:
    """uint8[H, W, 3] RGB to JPEG, quality 95.

    Images under 128 pixels keep full-resolution chroma: halving it smears their colours.
    """
    small = min(image.shape[:2]) < 128
    sampling = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444 if small
                else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420)
    parameters = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling)
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, parameters)[1].tobytes()


def decode(data: bytes, swapped: bool = False) -> np.ndarray:
    """A JPEG or PNG, possibly padded with zeros, as uint8[H, W, 3] RGB.

    Args:
      data: the file.
      swapped: red and blue are exchanged in it, because RGB was given to OpenCV as BGR.

    Raises:
      UserError: it is not a whole image.
    """
    data = data.rstrip(b"\0") if data[:2] == b"\xff\xd8" else data
    image = None
    # OpenCV 4 fills what a truncated JPEG lacks with grey instead of failing.
    if data and (data[:2] != b"\xff\xd8" or data[-2:] == b"\xff\xd9"):
        flags = cv2.IMREAD_COLOR_BGR if swapped else cv2.IMREAD_COLOR_RGB
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise UserError(f"{len(data)} bytes are not a whole image")
    return image


def size(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image, from its first bytes.

    Raises:
      UserError: it is not an image.
    """
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except OSError as error:
        raise UserError(f"{len(data)} bytes are not an image") from error


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8[H, W, 3] to uint8[size, size, 3] by area means; the aspect ratio is not kept, as in
    Octo and OpenVLA."""
    if image.shape[:2] == (size, size):
        return image
    shrinks = min(image.shape[:2]) >= size
    return cv2.resize(image, (size, size),
                      interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def jpegs(images, size: int) -> list[bytes]:
    """Images, uint8[H, W, 3] RGB each, as JPEGs of size x size pixels."""
    return [encode_jpeg(resize(image, size)) for image in images]


def recode(data: bytes, size: int, swapped: bool = False) -> bytes:
    """An encoded image as JPEG of size x size pixels, RGB; see `decode`. One that is such already
    is not encoded anew.

    Raises:
      UserError: it is not a whole image.
    """
    image = decode(data, swapped)
    if image.shape[:2] == (size, size) and data[:2] == b"\xff\xd8" and not swapped:
        return data.rstrip(b"\0")
    return encode_jpeg(resize(image, size))
