"""A loaded pipeline: requests in, portraits out."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from idgen.adapters.backends import choose_backend, facts_of
from idgen.backbone import Backbone
from idgen.bases import base_name
from idgen.batching import DECIDED, GIVEN, OPTIONAL
from idgen.conditioning import Conditioning
from idgen.errors import BadRequest, NoFaceFound
from idgen.faces import FaceExtractor
from idgen.few_step import FEW_STEP
from idgen.identity import UNKNOWN, Identity
from idgen.images import open_photo
from idgen.method import Method, Order
from idgen.overlap import Denoised
from idgen.pictures import is_drawing, is_picture
from idgen.portrait import Portrait
from idgen.provenance import provenance
from idgen.request import SEED_LIMIT, Request
from idgen.sampler import EXACT, Callback, sample
from idgen.schedulers import make_scheduler
from idgen.speed import Levers, choose_levers
from idgen.start import start_of


class Pipeline:
    """One method, or several at once, over a backbone. Make with :func:`idgen.load`."""

    def __init__(
        self,
        backbone: Backbone,
        methods: Sequence[Method],
        extractor: FaceExtractor | None,
        *,
        further: Mapping[str, FaceExtractor | None] | None = None,
        attention: str = "auto",
        levers: Levers = EXACT,
    ) -> None:
        self.backbone = backbone
        self.methods = list(methods)
        self.extractor = extractor
        """Finds the face in photos and measures likeness; ``None`` when no face pack is here."""
        self.further = dict(further or {})
        """By their names, the extractors of methods that were trained on another recogniser than the first; ``None``
        where it is not here."""
        self.attention, self.attention_reason = choose_backend(attention, backbone.dtype, facts_of(backbone.device))
        """The kernel in use, never ``auto``, and why."""
        self._levers = levers
        if sum(m.speaks_text for m in methods) and len(methods) > 1:
            raise BadRequest("arc2face replaces the UNet and the prompt, so it cannot be combined.", "pipeline")

    @property
    def levers(self) -> Levers:
        """What is traded for speed unless a call says otherwise (see :mod:`idgen.speed`), with what any pipeline on the
        same base has changed its models by."""
        return self._levers.upon(self.backbone.levers)

    @property
    def name(self) -> str:
        """``instantid``, or ``instantid+ip-adapter-faceid`` for two methods at once."""
        return "+".join(method.name for method in self.methods)

    def generate(
        self,
        who: Any = None,
        prompt: str | None = None,
        *,
        callback: Callback | None = None,
        latents: Tensor | None = None,
        output: str = "image",
        speed: str | Levers | None = None,
        **fields: Any,
    ) -> Any:
        """Make ``n`` portraits of one person.

        Args:
            who: a photo, several photos of one person, or an :class:`idgen.Identity`.
            prompt: what to show; ``None`` takes the method's default.
            callback: called after each step with a :class:`idgen.sampler.Step`; returning ``False`` cancels.
            latents: start noise (n, c, h, w) instead of seeded noise.
            output: ``"image"`` for portraits, ``"latent"`` for the final latents (n, c, h, w).
            speed: a preset or levers for this call, instead of those the pipeline was loaded with; what was compiled or
                quantised at load stays so.
            fields: the other fields of :class:`idgen.request.Request`.
        Raises:
            BadRequest, BadImage, NoFaceFound, OutOfMemory, Cancelled.
        """
        request = Request.create(who=who, prompt=prompt, pipeline=self.name, **fields)
        results = self.generate_many([request], callback=callback, latents=latents, output=output, speed=speed)
        return results if output == "latent" else results[0]

    def generate_many(
        self,
        requests: Sequence[Request | Order],
        *,
        callback: Callback | None = None,
        latents: Tensor | None = None,
        output: str = "image",
        speed: str | Levers | None = None,
    ) -> Any:
        """Run several requests in one batch; they may be for different people, prompts, seeds and scales.

        Args:
            requests: requests, or what :meth:`order` made of them: whoever keeps orders looks at a photo only once.
            callback, latents, output, speed: as for :meth:`generate`.
        Returns:
            A list of portraits for each request; with ``output="latent"`` one tensor (B, c, h, w), in order.
        Raises:
            BadRequest: the requests differ in what a batch must share: size, steps, guidance, scheduler, strength.
        """
        if output not in ("image", "latent"):
            raise BadRequest(f"output is {output!r}; choose 'image' or 'latent'.", "output")
        denoised = self.denoise(requests, callback=callback, latents=latents, speed=speed)
        return denoised.latents.float().cpu() if output == "latent" else self.finish(denoised)

    def denoise(
        self,
        requests: Sequence[Request | Order],
        *,
        callback: Callback | None = None,
        latents: Tensor | None = None,
        speed: str | Levers | None = None,
    ) -> Denoised:
        """The first half of :meth:`generate_many`, up to the final latents; it alone needs the UNet.

        Args, Raises: as for :meth:`generate_many`.
        """
        orders = [each if isinstance(each, Order) else self.order(each) for each in requests]
        self._check_batch(orders)
        conditioning = self.condition(orders)
        start, generators = start_of(self.backbone, orders, latents)
        first = orders[0]
        levers = self.levers if speed is None else choose_levers(speed).at_load_of(self.levers)
        final = sample(
            self.backbone,
            conditioning,
            start,
            make_scheduler(first.scheduler, self.backbone.scheduler),
            steps=first.steps,
            guidance=first.guidance,
            generators=generators,
            callback=callback,
            attention=self.attention,
            levers=levers,
        )
        ready = torch.cuda.current_stream(final.device).record_event() if final.is_cuda else None
        return Denoised(orders, final, levers, ready)

    def finish(self, denoised: Denoised) -> list[list[Portrait]]:
        """The second half: decode and measure the likeness. May run in another thread than :meth:`denoise`.

        Returns:
            A list of portraits for each order.
        Raises:
            OutOfMemory, IdgenError: as :meth:`idgen.backbone.Backbone.decode`.
        """
        first = denoised.orders[0]
        # About a megapixel at a time: the decoder is what needs most memory.
        rows = denoised.latents.split(max(1, 2**20 // (first.width * first.height)))
        pixels = torch.cat([self.backbone.decode(each, denoised.ready) for each in rows])
        return self._portraits(denoised.orders, pixels, denoised.levers)

    def condition(self, orders: Sequence[Order]) -> Conditioning:
        """The conditioning of one run: of all methods, merged."""
        parts = [method.condition([order.read_by(method.name) for order in orders]) for method in self.methods]
        merged = parts[0]
        for part in parts[1:]:
            merged = merged.merged(part)
        return merged

    def order(self, request: Request) -> Order:
        """Decide every field that the request leaves open."""
        identity, embedding, others, pictures = self._who(request)
        decided = self.settings(request)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        if self.methods[0].name == "instantid" or request.pose is not None:
            request = request.change(pose=self._pose(request))
        return Order(
            request=request,
            identity=identity,
            embedding=embedding,
            embeddings=others,
            pictures=pictures,
            seeds=tuple((seed + k) % (SEED_LIMIT + 1) for k in range(request.n)),
            **decided,
        )

    def settings(self, request: Request) -> dict[str, Any]:
        """Prompts, size, steps, guidance, scales and scheduler of a request; what it leaves open takes the defaults."""
        defaults = self.methods[0].defaults_on(base_name(self.backbone))
        if self.levers.few_step is not None:
            defaults = FEW_STEP[self.levers.few_step].defaults(defaults)
        names = ("prompt", "negative_prompt", "steps", "guidance", "identity_scale", "structure_scale", "scheduler")
        decided: dict[str, Any] = dict(zip(("width", "height"), self._size(request)))
        for name in names:
            given = getattr(request, name)
            decided[name] = getattr(defaults, name) if given is None else given
        return decided

    def _size(self, request: Request) -> tuple[int, int]:
        side = self.backbone.default_size
        default = (side, side)
        public = {"sdxl": 1024, "sd15": 512}[self.backbone.family]
        if self.methods[0].defaults.size is not None and side == public:
            default = self.methods[0].defaults.size
        default = request.drawn_size() or default
        return request.width or default[0], request.height or default[1]

    def identity(self, photos: Any, *, name: str | None = None) -> Identity:
        """An identity from photos of one person, with the embeddings by every recogniser that the methods read.

        Args:
            photos, name: as for :meth:`idgen.Identity.from_photos`.
        Raises:
            BadRequest, BadImage, NoFaceFound: as there. WeightsMissing: a face pack is not here.
        """
        made = Identity.from_photos(photos, self._extractor(), name=name)
        for method in self._readers()[1:]:
            extractor = self._extractor_of(method)
            if extractor.recogniser_name not in made.embeddings:
                made = made.joined(Identity.from_photos(photos, extractor))
        return made

    def _who(
        self, request: Request
    ) -> tuple[Identity | None, np.ndarray | None, dict[str, np.ndarray], tuple[Any, ...]]:
        """The person, the embedding that the first method reads, those that the others read by their names, and the
        pictures that an image encoder would see."""
        who, readers = request.who, self._readers()
        if isinstance(who, Identity):
            read = [self._embedding_of(who, method) for method in readers] or [who.embedding]
            others = {method.name: each for method, each in zip(readers[1:], read[1:])}
            return who, read[0], others, (who.crop,) if who.crop is not None else ()
        if who is None:
            if readers:
                raise BadRequest(f"{self.name} needs a photo or an identity.", "who")
            return None, None, {}, ()
        photos = list(who) if isinstance(who, (list, tuple)) else [who]
        if not photos:
            raise BadRequest("give at least one photo.", "who")
        # Whole pictures are for image encoders; a reader of faces opens the photos itself.
        pictures = tuple(open_photo(photo) for photo in photos) if len(readers) < len(self.methods) else ()
        if not readers:
            return None, None, {}, pictures
        identity = self.identity(photos)
        read = [
            np.stack([self._extractor_of(method).face(photo).embedding for photo in photos])
            if method.each_photo
            else identity.for_recogniser(self._extractor_of(method).recogniser_name)
            for method in readers
        ]
        return identity, read[0], {method.name: each for method, each in zip(readers[1:], read[1:])}, pictures

    def _embedding_of(self, who: Identity, method: Method) -> np.ndarray:
        """What a method reads of an identity that was handed in."""
        if self.further.get(method.name, self.extractor) is None and (not self.further or UNKNOWN in who.embeddings):
            return who.embedding  # without a face pack nothing is known of the recogniser: believed to be the right one
        wanted = self._extractor_of(method).recogniser_name
        if self.further and not {wanted, UNKNOWN} & set(who.embeddings):
            raise BadRequest(
                f"{who!r} has no embedding by {wanted}, which {method.name} in {self.name} reads. Give the photos, or "
                "make the identity from them with the method identity() of this pipeline: it asks every recogniser.",
                "who",
            )
        return who.for_recogniser(wanted)

    def _readers(self) -> list[Method]:
        """The methods that read a face."""
        return [method for method in self.methods if method.recogniser]

    def _extractor_of(self, method: Method) -> FaceExtractor:
        """The extractor whose recogniser a method was trained on."""
        if method.name not in self.further:
            return self._extractor()
        found = self.further[method.name]
        if found is None:
            from idgen.api import extractor_for

            found = self.further[method.name] = extractor_for(type(method), self.backbone)
        return found

    def _extractor(self) -> FaceExtractor:
        if self.extractor is None:
            from idgen.api import extractor_for

            self.extractor = extractor_for(type([*self._readers(), *self.methods][0]), self.backbone)
        return self.extractor

    def _pose(self, request: Request) -> Any:
        """Keypoints (5, 2) in output pixels, a drawing as it is, or ``None`` for the identity's own."""
        pose = request.pose
        if pose is None:
            return None
        if not is_picture(pose):
            points = np.asarray(pose, dtype=np.float32)
            if points.shape != (5, 2) or not np.isfinite(points).all():
                raise BadRequest(
                    "pose must be a photo, a keypoint drawing or finite keypoints of shape (5, 2).", "pose"
                )
            return points
        picture = open_photo(pose)
        if is_drawing(picture):
            return picture
        face = self._extractor().face(picture)
        size = self._size(request.change(pose=None))
        scale = min(size[0] / picture.width, size[1] / picture.height)
        margin = (np.array(size) - np.array(picture.size) * scale) / 2
        return (face.keypoints * scale + margin).astype(np.float32)

    def _check_batch(self, orders: list[Order]) -> None:
        if not orders:
            raise BadRequest("give at least one request.", "requests")
        for names, all_values in ((DECIDED, orders), (GIVEN, [order.request for order in orders])):
            for name in names:
                if len({getattr(values, name) for values in all_values}) > 1:
                    raise BadRequest(f"requests of one batch must share {name}.", name)
        for name in OPTIONAL:
            if len({getattr(order.request, name) is None for order in orders}) > 1:
                raise BadRequest(f"requests of one batch must all have {name}, or none.", name)

    def _portraits(self, orders: list[Order], pixels: Tensor, levers: Levers) -> list[list[Portrait]]:
        arrays = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        results: list[list[Portrait]] = []
        row = 0
        for order in orders:
            portraits = []
            record = provenance(self, order, levers)
            for seed in order.seeds:
                image = Image.fromarray(arrays[row])
                likeness, note = self.likeness(order.identity, image)
                portraits.append(Portrait(image, seed, likeness, note, record))
                row += 1
            results.append(portraits)
        return results

    def likeness(self, identity: Identity | None, image: Any) -> tuple[float | None, str | None]:
        """The cosine between an identity and the face in a picture, or ``None`` and the reason."""
        if identity is None:
            return None, "this pipeline recognises no face"
        if self.extractor is None:
            return None, "no face pack is here to measure it"
        if not {self.extractor.recogniser_name, UNKNOWN} & set(identity.embeddings):
            return None, f"the identity was not made by {self.extractor.recogniser_name}"
        try:
            face = self.extractor.face(image)
        except NoFaceFound:
            return None, "no face was found in the result"
        return float(identity.cosine(Identity(face.embedding, recogniser=self.extractor.recogniser_name))), None
