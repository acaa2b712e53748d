"""sm90.py's block: a tile of 64 G outputs for T tokens, or a rank's share of its columns of q."""

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.epilogue import Epilogue
from schedules.intrin import cuda
from schedules.ternary_matmul.cuda import CHUNK, FIELDS, TILE, WEIGHT_BITS, field
from schedules.ternary_matmul.form_sm90 import SWIZZLE_BYTES, Form


def exact(acc: Expr) -> Expr:
    """float32 of a sum of weights as they are multiplied."""
    return T.cast(T.shift_right(T.reinterpret("int32", acc), WEIGHT_BITS), "float32")


class Block:
    """Emits a block's work: rows n0 = 64 G b on, tokens m0 = T c on.

    `extra`, what an epilogue reads besides, comes into stages that have no chunk left, if they can
    hold it. Of two matrices the first half of the threads has the first one's rows, the others the
    same rows of the second one; n0 is 32 G b.
    """

    def __init__(self, form: Form, q, weights: Sequence[Any], rows, rank, b, c, t, extra=None):
        self.form, self.q, self.weights, self.rows = form, q, weights, rows
        self.extra: Any = extra if form.can_hold_extra else None
        self.rank, self.t = rank, t
        self.n0, self.m0 = T.bind(b * form.height), T.bind(c * form.tokens)
        self.lane = T.bind(t % cuda.WARP)
        # A warp's 16 rows are a tile of the layout
        self.row = T.bind(t // cuda.WARP % (form.height // TILE) * TILE)
        self.tile = T.bind(T.min((self.n0 + self.row) // TILE, form.shape.tiles - 1))
        address = cuda.shared_bytes(form.shared_bytes)
        aligned = address + T.uint32(SWIZZLE_BYTES - 1) & T.uint32(-SWIZZLE_BYTES % 2**32)
        self.base = T.bind(aligned)
        self.acc = cuda.local("uint32", form.tokens // 2)
        self.words = cuda.local("uint32", 4)
        self.a = cuda.local("uint32", 2 * 4 * FIELDS)

    def multiply(self) -> None:
        form = self.form
        for i in range(form.tokens // 2):
            cuda.store(self.acc, T.uint32(0), i)
        for chunk in range(form.stages - 2):
            self._copy(T.int32(chunk), chunk < form.steps)
        cuda.wait_for_copies(form.stages - 3)
        self._unpack(0, 0)
        free = 0 if self.extra is None else min(form.steps, form.stages - 2)
        self._each_step(0, form.steps - free, True)
        self._each_step(form.steps - free, free, False)
        cuda.ptx("wgmma.wait_group.sync.aligned", 0)

    def _each_step(self, first: int, count: int, is_chunk: bool) -> None:
        if count > 1:
            with T.serial(count // 2) as pair:
                for i in range(2):
                    self._step(first + 2 * pair + i, (first + i) % 2, is_chunk)
        if count % 2:
            last = first + count - 1
            self._step(T.int32(last), last % 2, is_chunk)

    def _step(self, chunk: Expr, parity: int, is_chunk: bool) -> None:
        """Multiplies a chunk; meanwhile the next one is unpacked, and a later one on its way."""
        form = self.form
        cuda.wait_for_copies(form.stages - 4)  # the chunk and, for `_unpack`, the next one
        cuda.ptx("fence.proxy.async.shared::cta")  # cp.async wrote what the tensor cores read
        cuda.sync()
        cuda.ptx("wgmma.fence.sync.aligned")
        stage = self._stage(chunk)
        for step in range(4):
            self._wgmma(stage, parity, step)
        cuda.ptx("wgmma.commit_group.sync.aligned")
        cuda.ptx("wgmma.wait_group.sync.aligned", 1)
        self._copy(chunk + form.stages - 2, is_chunk)  # where the chunk before the last one was
        self._unpack(chunk + 1, 1 - parity)

    def _stage(self, chunk: Expr | int) -> Expr:
        form = self.form
        return T.bind(self.base + T.cast(chunk % form.stages * form.stage_bytes, "uint32"))

    def _wgmma(self, stage: Expr, parity: int, step: int) -> None:
        """acc[64, T] += a[64, 32] . x[T, 32]: columns 32 step on of the chunk."""
        tokens = self.form.tokens
        acc = [self.acc[i] for i in range(tokens // 2)]
        first = parity * 4 * FIELDS + 4 * step
        a = [self.a[first + i] for i in range(4)]
        x = cuda.swizzled_matrix(stage + T.uint32(32 * step))
        instruction = f"wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8"
        cuda.ptx(instruction, *acc, *a, x, T.ptx.pred(True))

    def _own_words(self, stage: Expr) -> Expr:
        """Where a thread's 16 bytes of weights are: it copies and reads them itself."""
        return stage + T.uint32(self.form.token_bytes) + T.cast(self.t * 16, "uint32")

    def _unpack(self, chunk: Expr | int, parity: int) -> None:
        """a[parity, step, 4] of the chunk: a step is two fields of a 64-column run."""
        four = [self.words[i] for i in range(4)]
        cuda.ptx("ld.shared.v4.b32", *four, self._own_words(self._stage(chunk)))
        for step in range(4):
            for i in range(4):  # rows g, g + 8 of the first 16 columns, then of the others
                word = self.words[step // 2 * 2 + i % 2]
                value = field(word, step % 2 * 2 + i // 2)
                cuda.store(self.a, value, (parity * 4 + step) * FIELDS + i)

    def _copy(self, chunk: Expr, is_chunk: bool) -> None:
        """A chunk to its stage; or, there, a share of what the epilogue reads."""
        stage = self._stage(chunk)
        if is_chunk or self.extra is None:
            self._copy_chunk(stage, chunk)
        else:
            self._copy_extra(stage, chunk - self.form.steps)
        cuda.commit_copies()

    def _copy_extra(self, stage: Expr, share: Expr) -> None:
        """A share of the tile's tokens of `extra`; zeros past M and N. The 16 bytes p of a token r
        lie at p ^ r / 2 % 4 * 2, for the banks."""
        form, n = self.form, self.form.shape.n
        pieces = form.height // 4
        piece = T.bind(self.t % pieces)
        column = T.bind(self.n0 + piece * 4)
        for i in range(form.extra_tokens * pieces // form.threads):
            row = T.bind(i * (form.threads // pieces) + self.t // pieces)
            token = T.bind(share * form.extra_tokens + row)
            m = self.m0 + token
            place = T.bitwise_xor(piece, row // 2 % 4 * 2) * 16
            source = self.extra[T.min(m, self.rows - 1), T.min(column, n - 4)]
            is_inside = tirx.all(token < form.tokens, m < self.rows, column < n)
            to = stage + T.cast(row * (4 * form.height) + place, "uint32")
            cuda.copy_16_bytes(to, T.address_of(source), T.Select(is_inside, 16, 0))

    def _load_extra(self, j: Expr, i: int, half: int) -> Expr:
        """Of token 8 j + 2 (lane % 4) + i and the thread's first or second output."""
        form, value = self.form, cuda.local("float32", 1)
        groups = form.extra_tokens // 8  # of a stage
        token = j % groups * 8 + self.lane % 4 * 2 + i
        output = self.row + self.lane // 4 + 8 * half
        piece = T.bitwise_xor(output // 4, self.lane % 4 * 2)
        at = token * (4 * form.height) + piece * 16 + output % 4 * 4
        stage = self._stage(T.bind(form.steps + j // groups))
        cuda.ptx("ld.shared.f32", value[0], stage + T.cast(at, "uint32"))
        return value[0]

    def _copy_chunk(self, stage: Expr, chunk: Expr) -> None:
        """Tokens and weights of a chunk; zeros past M and K.

        The 16 bytes p of a token r lie at p ^ r % 8.
        """
        form, k = self.form, self.form.shape.k
        chunk = T.bind(chunk * form.ranks + self.rank)
        at = T.min(chunk, form.shape.chunks - 1)
        self._copy_weights(self._own_words(stage), at)
        pieces = CHUNK // 16
        piece = self.t % pieces  # of every row that the thread copies
        column = T.bind(chunk * CHUNK + piece * 16)
        for i in range(form.tokens * pieces // form.threads):
            row = i * (form.threads // pieces) + self.t // pieces
            m = self.m0 + row
            to = stage + T.cast(row * CHUNK + T.bitwise_xor(piece, row % 8) * 16, "uint32")
            source = self.q[T.min(m, self.rows - 1), T.min(column, k - 16)]
            valid = T.Select(cuda.both(column < k, m < self.rows), 16, 0)
            cuda.copy_16_bytes(to, T.address_of(source), valid)

    def _copy_weights(self, to: Expr, chunk: Expr) -> None:
        own = [T.address_of(w[self.tile, chunk, self.lane * 16]) for w in self.weights]
        if len(own) == 1:
            cuda.copy_16_bytes(to, own[0])
            return
        with T.If(self.t < self.form.threads // 2):
            for address, branch in zip(own, (T.Then, T.Else), strict=True):
                with branch():
                    cuda.copy_16_bytes(to, address)

    def finish(self, end: Epilogue, scale, w_scale, extra, out) -> None:
        """Register 4j + 2h + i holds row g + 8h of the warp and token 8j + 2 (lane % 4) + i."""
        self.outputs = [T.bind(self.n0 + self.row + self.lane // 4 + 8 * i) for i in range(2)]
        self.last = self.form.shape.n - 1
        weight_scales = self.own(w_scale)
        tensors = scale, weight_scales, extra, out
        if self.form.ranks > 1:
            self._finish_share(end, tensors)
            return
        if self.extra is not None:
            cuda.wait_for_copies()
            cuda.sync()
        with cuda.unrolled(self.form.tokens // 8) as j:
            self._write(end, j, [self.acc[4 * j + i] for i in range(4)], tensors)

    def _finish_share(self, end: Epilogue, tensors: tuple) -> None:
        """The rank's share of the tile's tokens: sums of all ranks, out of their shared memory."""
        ranks, groups = self.form.ranks, self.form.tokens // 8
        own, pitch = self.put_sums()
        remote, words = cuda.local("uint32", ranks), cuda.local("uint32", 4)
        for rank in range(ranks):
            cuda.ptx("mapa.shared::cluster.u32", remote[rank], own, T.uint32(rank))
        cuda.sync_cluster()
        assert groups % ranks == 0
        with cuda.unrolled(groups // ranks) as step:
            j = T.bind(self.rank * (groups // ranks) + step)
            for i in range(4):
                cuda.store(self.acc, T.uint32(0), i)
            for rank in range(ranks):
                at = remote[rank] + T.cast(j * pitch, "uint32")
                cuda.ptx("ld.shared::cluster.v4.b32", *[words[i] for i in range(4)], at)
                for i in range(4):
                    cuda.store(self.acc, self.acc[i] + words[i], i)
            self._write(end, j, [self.acc[i] for i in range(4)], tensors)
        cuda.sync_cluster()  # a block's shared memory lives until all have read it

    def own(self, w_scale) -> list[Expr]:
        """Of the thread's outputs."""
        return [T.bind(w_scale[T.min(n, self.last)]) for n in self.outputs]

    def of_tokens(self, values, dtype: str, first: Expr, count: int) -> Any:
        """Of the thread's tokens of `count` groups from group `first` on, two of each: all loads at
        once, before what follows waits for shared memory."""
        own = cuda.local(dtype, 2 * count)
        with cuda.unrolled(count) as step:
            for i in range(2):
                m = self.token(first + step, i)
                cuda.store(own, T.cast(values[T.min(m, self.rows - 1)], dtype), 2 * step + i)
        return own

    def token(self, j: Expr, i: int) -> Expr:
        """The row of M of a thread's sums 4 j + i and 4 j + 2 + i."""
        return self.m0 + 8 * j + self.lane % 4 * 2 + i

    def put_sums(self) -> tuple[Expr, int]:
        """All of a thread's sums where the stages were: where the first four are, how far others.

        A barrier of those who read them must follow.
        """
        own, pitch = T.bind(self.base + T.cast(self.t * 16, "uint32")), 16 * self.form.threads
        cuda.wait_for_copies()
        cuda.sync()
        for j in range(self.form.tokens // 8):
            four = [self.acc[4 * j + i] for i in range(4)]
            cuda.ptx("st.shared.v4.b32", own + T.uint32(j * pitch), *four)
        return own, pitch

    def _write(self, end: Epilogue, j: Expr, sums: list, tensors: tuple) -> None:
        """Loads are of the nearest element inside, so that none waits for a condition."""
        scale, weight_scales, extra, out = tensors
        for i in range(2):
            m = T.bind(self.token(j, i))
            near = T.bind(T.min(m, self.rows - 1))
            for half, (n, weight_scale) in enumerate(zip(self.outputs, weight_scales, strict=True)):
                acc = exact(sums[2 * half + i])
                other = None
                if self.extra is not None:
                    other = self._load_extra(j, i, half)
                elif end.extra:
                    other = T.bind(extra[near, T.min(n, self.last)])
                value = T.bind(end.value(acc, scale[near] * weight_scale, other))
                with cuda.when(cuda.both(m < self.rows, n <= self.last)):
                    cuda.store(out, value, m, n)
