# For login shells in a root tree that runs in memory: busybox's applets behind
# the root's own programs, and what busybox's init leaves out.
[ ! -d /run/memlinux/bin ] || export PATH="$PATH:/run/memlinux/bin"
if [ "$HOME" = / ] && [ "$(id -u)" = 0 ] && [ -d /root ]; then
    export HOME=/root
    cd /root || true
fi
case $(tty),$TERM in
/dev/ttyS*,linux | /dev/hvc*,linux) export TERM=vt102 ;;
esac
