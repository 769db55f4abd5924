"""What scikit-learn's tools ask of an estimator; scikit-learn itself is imported only when they do."""

from __future__ import annotations

import inspect
import sys
from typing import Any, Self

import numpy as np

from gpuclust.errors import InputError


class ScikitLearn:
    """Parameters, tags, output containers and metadata routing, as ``sklearn.base.BaseEstimator`` has them."""

    _sklearn_auto_wrap_output_keys = frozenset({"transform"})

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name."""
        return {name: getattr(self, name) for name in self._defaults()}

    def set_params(self, **params: Any) -> Self:
        """Set parameters by name.

        Raises
        ------
        InputError
            For a name that is none.
        """
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise InputError(
                    f"Invalid parameter {name!r} for estimator {self!r}. Valid parameters are: {sorted(known)!r}."
                )
            setattr(self, name, value)
        return self

    def set_output(self, *, transform: str | None = None) -> Self:
        """Return ``transform``'s result as ``"pandas"`` or ``"polars"`` where it would be a NumPy array; see
        ``sklearn.base.TransformerMixin``."""
        if transform is not None:
            self._sklearn_output_config = {"transform": transform}
        return self

    def get_metadata_routing(self) -> Any:
        """Which methods want ``sample_weight``: a `sklearn.utils.metadata_routing.MetadataRequest`."""
        from sklearn.utils.metadata_routing import MetadataRequest, get_routing_for_object

        if hasattr(self, "_metadata_request"):
            return get_routing_for_object(self._metadata_request)
        requests = MetadataRequest(owner=self)
        for method in ("fit", "score"):
            getattr(requests, method).add_request(param="sample_weight", alias=None)
        return requests

    def set_fit_request(self, *, sample_weight: bool | str | None = None) -> Self:
        """Ask scikit-learn's meta-estimators to pass ``sample_weight`` to ``fit``."""
        return self._request("fit", sample_weight)

    def set_score_request(self, *, sample_weight: bool | str | None = None) -> Self:
        """Ask scikit-learn's meta-estimators to pass ``sample_weight`` to ``score``."""
        return self._request("score", sample_weight)

    def __repr__(self) -> str:
        defaults = self._defaults()
        changed = {
            name: value
            for name, value in self.get_params().items()
            if not (value is defaults[name] or (type(value) is type(defaults[name]) and value == defaults[name]))
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type="clusterer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32"]),
            input_tags=InputTags(),
        )

    def _defaults(self) -> dict[str, Any]:
        """The constructor's parameters, with their defaults."""
        return {
            name: parameter.default
            for name, parameter in inspect.signature(type(self).__init__).parameters.items()
            if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        }

    def _request(self, method: str, sample_weight: bool | str | None) -> Self:
        requests = self.get_metadata_routing()
        getattr(requests, method).add_request(param="sample_weight", alias=sample_weight)
        self._metadata_request = requests
        return self

    def _in_container(self, result: Any, X: Any) -> Any:
        """The result of ``transform`` in the container that `set_output` or scikit-learn's settings ask for."""
        if not isinstance(result, np.ndarray) or "sklearn" not in sys.modules:
            return result  # nobody can have asked
        from sklearn.utils._set_output import _wrap_data_with_container

        return _wrap_data_with_container("transform", result, X, self)
