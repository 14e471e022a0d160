#!/bin/bash
# First process of the guest that tests/nodes/guest.py boots. The kernel hands over the GUEST_* variables.
# Its root is the host's, read-only, with the guest's packages and then its own disk on top: what it writes is its own.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
own=$GUEST_FOLDER

if [ "${1:-}" != inside ]; then
  mount -t proc proc /proc
  packages=$GUEST_PACKAGES/usr
  LD_LIBRARY_PATH=$packages/lib/x86_64-linux-gnu "$packages/sbin/modprobe" -d "$packages" overlay
  mount -t ext4 -o noatime /dev/ubda "$own/disk"
  mkdir -p "$own/disk/upper" "$own/disk/work"
  mount -t hostfs -o "$GUEST_PACKAGES" none "$own/packages"  # a file system of its own: overlay's layers may not contain each other
  mount -t overlay -o "lowerdir=$own/packages:/,upperdir=$own/disk/upper,workdir=$own/disk/work" overlay "$own/root"
  cd "$own/root"
  mkdir -p disk host
  mount --no-mtab --move "$own/disk" disk
  pivot_root . host
  exec chroot . "$0" inside </dev/console >/dev/console 2>&1
fi

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
umount --lazy /host
ln -sfn /proc/self/fd /dev/fd
for i in 0:stdin 1:stdout 2:stderr; do ln -sfn "/proc/self/fd/${i%%:*}" "/dev/${i##*:}"; done
mkdir -p /run/lock

# What the host has of these is its own business: the guest keeps its own on its disk.
for folder in ${GUEST_OWN//:/ }; do
  mkdir -p "/disk/own$folder" "$folder"
  mount --bind "/disk/own$folder" "$folder"
done
mount --make-rshared /

# The guest's CPU in the form that programs expect (User-Mode Linux writes another).
cp "$own/cpuinfo" /run/cpuinfo
mount --bind /run/cpuinfo /proc/cpuinfo
[ -e /disk/machine-id ] || tr -d - < /proc/sys/kernel/random/uuid > /disk/machine-id
cp /disk/machine-id /etc/machine-id
hostname "$GUEST_NAME"
printf '127.0.0.1 localhost\n%s %s\n' "${GUEST_ADDRESS%/*}" "$GUEST_NAME" > /etc/hosts

modprobe -a veth nfsv4
ip link set lo up
ip address add "$GUEST_ADDRESS" dev vec0
ip link set vec0 up
ip route add default via "$GUEST_GATEWAY"
sysctl -qw net.ipv4.ip_forward=1

# A shell for the host alone.
socat -t86400 "TCP-LISTEN:$GUEST_PORT,bind=${GUEST_ADDRESS%/*},range=$GUEST_GATEWAY/32,fork,reuseaddr" EXEC:/bin/bash,stderr </dev/null &
echo "guest is up after $(cut -d' ' -f1 /proc/uptime) s"
while :; do wait -n || sleep 1; done  # and take in what has lost its parent
