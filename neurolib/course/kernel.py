"""The kernel in which runs execute notebooks: this Python."""

from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager


class ThisPython(AsyncKernelManager):
    """Starts the running Python; the user's kernelspec ``python3`` may name another one."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """The kernelspec of the installed ipykernel."""
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())
