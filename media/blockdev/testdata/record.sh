#!/bin/sh
# Prints what the kernel tells of this machine's disks, as testdata/machines keeps
# it: sh record.sh >machines/NAME.txt, and say in its first line what machine it is.
# Serial numbers and mount points are in it: look it over before you give it away.
# It needs only a POSIX shell, so that it runs in a rescue system, too.

# put prints an attribute as "name = value", quoted as in Go where that is needed.
put() {
	[ -f "$1/$2" ] || return 0
	if value=$(cat "$1/$2" 2>/dev/null); then
		case $2 in
		*vpd_pg80) value='"' ;; # holds zero bytes, which no variable can
		esac
		case $value in
		*[!\ -~]* | *'"'* | *\\*)
			printf '  %s = "%s"\n' "$2" "$(od -An -v -tx1 "$1/$2" | tr -d ' \n' | sed 's/0a$//; s/../\\x&/g')" ;;
		' '* | *' ') printf '  %s = "%s"\n' "$2" "$value" ;;
		'') ;;
		*) printf '  %s = %s\n' "$2" "$value" ;;
		esac
	else
		printf '  %s/\n' "$2" # there, and can't be read
	fi
}

names() {
	for entry in "$1/$2"/*; do
		[ -e "$entry" ] || [ -L "$entry" ] || continue
		printf '  %s/%s/\n' "$2" "${entry##*/}"
	done
}

echo "# Recorded from $(uname -sr), $(cat /sys/class/dmi/id/product_name 2>/dev/null || echo unknown hardware)"
seen=
for link in /sys/class/block/*; do
	dir=$(readlink -f "$link")
	up=${dir%/*}
	while [ ${#up} -gt 12 ]; do # to the USB device that it is in
		if [ -f "$up/idVendor" ]; then
			case $seen in
			*" $up "*) ;;
			*)
				seen="$seen $up "
				echo "$up"
				for attr in idVendor manufacturer product serial; do put "$up" $attr; done
				;;
			esac
			break
		fi
		up=${up%/*}
	done
	echo "$dir"
	for attr in dev size ro removable hidden diskseq partition serial queue/logical_block_size queue/zoned queue/write_zeroes_max_bytes \
		device/type device/vendor device/model device/name device/serial device/vpd_pg80 dm/name dm/uuid md/level loop/backing_file; do
		put "$dir" $attr
	done
	if [ ! -f "$dir/partition" ]; then
		for attr in ro removable queue/logical_block_size; do
			[ -f "$dir/$attr" ] || echo "  ! $attr"
		done
	fi
	[ -d "$dir/holders" ] || echo "  ! holders"
	names "$dir" holders
	names "$dir" slaves
done
for dir in /sys/fs/btrfs/*/devices; do
	[ -d "$dir" ] || continue
	echo "${dir%/devices}"
	names "${dir%/devices}" devices
done
for link in /dev/root /dev/mapper/* /dev/disk/*/*; do
	[ -L "$link" ] || continue
	echo "${link%/*}"
	echo "  ${link##*/} -> $(readlink "$link")"
done
for file in /proc/swaps /proc/1/mountinfo /proc/self/mountinfo; do
	[ -r "$file" ] || continue
	echo "$file"
	sed 's/^/| /' "$file"
done
