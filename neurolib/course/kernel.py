"""The kernel in which runs execute notebooks: this Python, whatever kernels are installed."""

from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager


class ThisPython(AsyncKernelManager):
    """Starts the running Python: a kernelspec ``python3`` of the user's may be of another one."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """That of the installed ipykernel."""
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())
